"""`du.unlearn` from Python: an own module and own datasets, from the call to figures, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import Dataset

import distunlearn as du
from distunlearn.config.schema import EncoderConfig, RunConfig
from distunlearn.encoders.model import build_model
from distunlearn.encoders.own_module import create_own, hand_over, without_reset
from distunlearn.errors import ConfigError, DataError, EncoderError

TINY: dict[str, Any] = {
    "steps": 4, "seed": 3, "pretrain": {"epochs": 2, "batch": 16}, "constraint": {"view_pairs": 1},
    "unlearn": {"retain_batch": 16, "forget_batch": 8, "third_party_batch": 8},
    "audit": {"views": 4, "bootstrap": 100, "relearn_steps": 0},
}  # fmt: skip
SIZES = {"retain": 40, "forget": 24, "third_party": 30, "holdout": 40}


class Noise(Dataset):
    """Grey noise with labels."""

    def __init__(self, count: int, seed: int) -> None:
        self.images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], index % 3


class Net(nn.Sequential):
    """[n, 1, 8, 8] -> [n, 12]."""

    def __init__(self, width: int = 12) -> None:
        layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, width))
        super().__init__(*layers)


class Fixed(nn.Module):
    """Weights of its own that nothing can set anew."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, 8, 8))
        self.net = Net()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images * self.scale)


def datasets(**changes: Dataset) -> dict[str, Dataset]:
    return {name: Noise(size, seed) for seed, (name, size) in enumerate(SIZES.items())} | changes


def net() -> Net:
    torch.manual_seed(7)
    return Net()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> du.Run:
    out = tmp_path_factory.mktemp("door") / "run"
    return du.unlearn(net(), **datasets(), out=out, mean=[0.4], std=[0.3], **TINY).audit()


def test_an_own_module_is_forgotten_from_audited_and_exported(done: du.Run) -> None:
    assert done.verdict in ("pass", "fail", "inconclusive")
    assert done.figures["coverage"]["requested"] == 24 and done.figures["coverage"]["consumed_min"] >= 1
    assert done.figures["coverage"]["used_as_retain"] == 0
    assert set(done.figures["attacks"]["view_agreement"]) >= {"original", "unlearned", "retrained"}
    assert done.figures["attacks"]["view_agreement"]["retrained"]["auc"] is not None
    page = done.report.read_text(encoding="utf-8")
    assert page.startswith("<!") and done.status["next"] is None
    assert "all images of the dataset that was handed over to be forgotten" in page and "drawn by chance" not in page
    assert "datasets that were handed over in Python" in page and "was stated with the request" in page
    again = net()
    again.load_state_dict(load_file(done.out / "export" / "model.safetensors"))
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(done.encoder(images), again.eval()(images), rtol=0, atol=0)


def test_the_original_is_the_module_that_was_handed_over(done: du.Run) -> None:
    kept = load_file(done.out / "original" / "export" / "model.safetensors")
    given = net().state_dict()
    assert all(torch.equal(kept[name], given[name]) for name in given if not name.endswith("tracked"))
    unlearned = load_file(done.out / "export" / "model.safetensors")
    assert any(not torch.equal(kept[name], unlearned[name]) for name in kept)


def test_the_reference_starts_from_other_weights(done: du.Run) -> None:
    """Its heads are the same, its backbone is not: a copy of the original's weights would be no reference."""
    kept = load_file(done.out / "original" / "export" / "model.safetensors")
    retrained = load_file(done.out / "retrained" / "export" / "model.safetensors")
    cosine = torch.nn.functional.cosine_similarity(kept["4.weight"].flatten(), retrained["4.weight"].flatten(), dim=0)
    assert abs(float(cosine)) < 0.5


def test_the_same_call_goes_on_and_any_other_is_refused(done: du.Run) -> None:
    before = (done.out / "done.json").read_bytes()
    call = {"out": done.out, "mean": [0.4], "std": [0.3], **TINY}
    again = du.unlearn(net(), **datasets(), **call)
    assert (done.out / "done.json").read_bytes() == before and again.verdict == done.verdict
    with pytest.raises(DataError, match="other datasets"):
        du.unlearn(net(), **datasets(forget=Noise(24, 99)), **call)
    with pytest.raises(ConfigError, match="other weights"):
        du.unlearn(Net(), **datasets(), **call)
    with pytest.raises(ConfigError, match="encoder.std"):
        du.unlearn(net(), **datasets(), **{**call, "std": [0.5]})
    assert du.open_run(done.out, net()).figures == done.figures


def test_mean_and_std_are_applied_to_every_image() -> None:
    """Against a module that normalises by itself, on images in [-1, 1]."""
    name = hand_over(net())
    plain = RunConfig(encoder=EncoderConfig(name=name, image_size=8, stem="standard", mean=(0.4,), std=(0.3,)))
    model = build_model(plain, None).eval()
    images = torch.rand(6, 1, 8, 8, dtype=torch.float64).float()
    expected = model.backbone((images - 0.4) / 0.3)
    torch.testing.assert_close(model(2 * images - 1).embedding, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model.backbone(2 * images - 1), expected, atol=0.1)


def test_fresh_weights_are_a_function_of_the_seed_alone() -> None:
    cfg = EncoderConfig(name=hand_over(net()), image_size=8, stem="standard")
    first, again = (build_model(RunConfig(seed=1, encoder=cfg), None).backbone.state_dict() for _ in range(2))
    other = build_model(RunConfig(seed=2, encoder=cfg), None).backbone.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["4.weight"], other["4.weight"])
    assert not torch.equal(first["4.weight"], net().state_dict()["4.weight"])


def test_a_module_that_cannot_be_reset_has_no_reference(tmp_path: Path) -> None:
    assert without_reset(hand_over(Fixed())) == ["the encoder itself"]
    assert without_reset(hand_over(Fixed(), Fixed)) == []
    tiny = {**TINY, "steps": 3, "mean": [0.5], "std": [0.5]}
    run = du.unlearn(Fixed(), **datasets(), out=tmp_path / "run", **tiny).audit()
    assert run.figures["tier"] == 0 and run.figures["attacks"]["view_agreement"]["retrained"]["auc"] is None
    assert run.verdict == "inconclusive"
    with pytest.raises(ConfigError, match="give factory="):
        du.unlearn(Fixed(), **datasets(), out=tmp_path / "other", **{**tiny, "audit": {"tier": 1}})


def test_a_class_is_trained_first(tmp_path: Path) -> None:
    run = du.unlearn(Net, **datasets(), out=tmp_path / "run", **TINY)
    kept = load_file(run.out / "original" / "export" / "model.safetensors")
    assert kept["4.weight"].shape == (12, 8 * 36) and not (run.out / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3)), r"\[2, 4, 6, 6\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(100, 4)), "cannot embed"),
        (nn.Flatten(), "no weights"),
        (nn.ModuleDict({"a": nn.Linear(1, 1)}), "cannot embed"),
    ],
    ids=["a map", "another size", "no weights", "no forward"],
)
def test_what_is_no_encoder_is_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(EncoderError, match=words):
        create_own(EncoderConfig(name=hand_over(module), image_size=8, stem="standard"))


def test_idle_weights_are_refused() -> None:
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(3, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            for layer in list(self)[:5]:
                images = layer(images)
            return images

    with pytest.raises(EncoderError, match=r"2 weights .* take no part .*spare\.weight"):
        create_own(EncoderConfig(name=hand_over(Idle()), image_size=8, stem="standard"))


def test_what_is_not_there_yet_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not audited yet"):
        _ = du.Run(tmp_path).verdict
    with pytest.raises(DataError, match="no unlearned encoder"):
        _ = du.Run(tmp_path).encoder
    with pytest.raises(DataError, match="not a run directory"):
        du.open_run(tmp_path)


def test_large_first_images_ask_for_a_size(tmp_path: Path) -> None:
    class Large(Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> np.ndarray:
            return np.full((600, 700), 3, np.uint8)

    with pytest.raises(ConfigError, match="600 x 700"):
        du.unlearn(net(), **datasets(retain=Large()), out=tmp_path, **TINY)


def python(text: str, **variables: str) -> str:
    """What a fresh interpreter prints."""
    import os

    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | variables
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True, env=environment
    ).stdout


def test_importing_the_package_is_cheap_and_lets_idle_threads_sleep() -> None:
    text = "import os, sys, distunlearn; print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"
    assert python(text).split() == ["False", "PASSIVE"]
    assert python(text, OMP_WAIT_POLICY="ACTIVE").split() == ["False", "ACTIVE"]
    assert python("import torch\n" + text).split() == ["True", "None"]


def test_with_torch_first_a_second_team_of_threads_is_held() -> None:
    text = (
        "import torch, threading\nfrom distunlearn.common.openmp import sleep_when_idle\n"
        "threads = torch.get_num_threads(); sleep_when_idle(); sleep_when_idle()\n"
        "print(sum(t.name == 'openmp-team' for t in threading.enumerate()), torch.get_num_threads() == threads)"
    )
    assert python(text).split() == (["1", "True"] if torch.get_num_threads() > 1 or _cores() > 1 else ["0", "True"])
    assert python(text, OMP_WAIT_POLICY="ACTIVE").split() == ["0", "True"]


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({}, 0),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 0),
    ],
)
def test_the_number_of_threads_is_the_users(variables: dict[str, str], threads: int) -> None:
    text = (
        "import torch\nfrom distunlearn.distributed.process_group import _set_threads\n_set_threads(0, 1)\n"
        "print(torch.get_num_threads())"
    )
    assert int(python(text, **variables)) == (threads or _cores())


def test_scores_are_a_table_whose_aucs_are_those_of_the_summary(finished_run, tmp_path):
    out, _ = finished_run()
    run = du.open_run(out)
    table = run.scores
    assert set(table["encoder"]) == {"original", "unlearned", "retrained"} and not table["id"].isna().any()
    sides = table[(table["encoder"] == "unlearned") & table["role"].isin(["forget", "holdout"])]
    auc = roc_auc_score(sides["role"] == "forget", sides["view_agreement"])
    told = run.figures["attacks"]["view_agreement"]["unlearned"]["auc"]
    assert min(abs(auc - told), abs(1 - auc - told)) < 1e-9  # as a sign has it
    table.to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(DataError, match="not audited"):
        _ = du.Run(tmp_path).scores


def test_embeddings_and_losses_are_tables(finished_run, tmp_path):
    """The embeddings give the summary's linear CKA, after a way through a parquet file."""
    run = du.open_run(finished_run()[0])
    run.embeddings.to_parquet(tmp_path / "embeddings.parquet")
    table = pd.read_parquet(tmp_path / "embeddings.parquet")
    assert len(table) == len(run.scores) and table["embedding"][0].dtype == np.float32
    sides = [
        np.stack(rows.sort_values("id")["embedding"]).astype(np.float64)
        for _, rows in table[(table["role"] == "forget") & (table["encoder"] != "original")].groupby("encoder")
    ]
    one, two = (side - side.mean(0) for side in sides)
    cka = np.sum((one.T @ two) ** 2) / np.linalg.norm(one.T @ one) / np.linalg.norm(two.T @ two)
    assert cka == pytest.approx(run.figures["similarity"]["forget"]["to_retrained"]["unlearned"], abs=1e-9)

    steps = run.metrics.query("phase == 'unlearn' and step > 0")
    assert steps["step"].tolist() == list(range(1, 7)) and np.isfinite(steps["loss"]).all()
    (tmp_path / "metrics.jsonl").touch()
    assert du.Run(tmp_path).metrics.empty
    with pytest.raises(DataError, match="keep_signals"):
        _ = du.Run(tmp_path).embeddings
