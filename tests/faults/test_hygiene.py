"""Code that changes under a run, options that change unnoticed, hostile paths, and results that must not move."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import socket
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from photo_batches import photo_batch

from distunlearn.cli.exit import ended
from distunlearn.cli.main import NAMES, main
from distunlearn.config.load import load_config
from distunlearn.config.recipes import RECIPES
from distunlearn.config.schema import RunConfig
from distunlearn.data.schedule import permutation, random_words
from distunlearn.data.sources.sources import open_sources
from distunlearn.encoders.backbone import create_backbone
from distunlearn.encoders.model import MomentumEncoder, build_model
from distunlearn.engine import provenance
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.run_directory import claim
from distunlearn.errors import ConfigError
from distunlearn.methods.training import Pretrain, Training
from distunlearn.objectives import make_objective
from distunlearn.objectives.forward import Context
from distunlearn.objectives.queue import KeyQueue
from distunlearn.verify.ledger import read_ledger


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def plan(*settings: str, out: Path, verb: str = "plan") -> list[str]:
    return [verb, "digits", "--out", str(out), *tiny.settings(*settings)]


# -- another run in the same folder ----------------------------------------------------------------------------------


def test_settings_that_changed_are_shown_with_both_values(tmp_path):
    out = tmp_path / "run"
    claim(load_config("digits", None, list(tiny.TINY)), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changed = load_config("digits", None, [*tiny.TINY, "seed=3", "pretrain.lr=0.5", "data.forget=25"])
    with pytest.raises(ConfigError) as caught:
        claim(changed, out)
    for part in ("seed: 0 there, 3 now", "pretrain.lr: 0.004 there, 0.5 now", "data.forget: 24 there, 25 now"):
        assert part in str(caught.value)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_forget_list_that_was_edited_is_refused(tmp_path, capsys):
    ids = tmp_path / "ids.txt"
    listed = [i for i, _ in open_sources(RunConfig().data).members.samples][:30]
    ids.write_text("\n".join(listed[:24]))
    out = tmp_path / "run"
    assert main(plan(f"data.forget={ids}", out=out, verb="prepare")) == 0
    assert main(plan(f"data.forget={ids}", out=out, verb="prepare")) == 0  # negative control
    capsys.readouterr()
    ids.write_text("\n".join(listed[1:25]))
    assert main(plan(f"data.forget={ids}", out=out, verb="prepare")) == 3
    assert "ids.txt has changed since the request" in capsys.readouterr().err


def test_other_code_goes_on_only_where_it_is_accepted_and_is_written_down(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    provenance.require_same_code(ledger, accept=False)
    provenance.require_same_code(ledger, accept=False)  # the same code: nothing to add
    here = provenance.code_digest()
    assert [line["digest"] for line in read_ledger(ledger.path)] == [here] and len(here) == 64
    monkeypatch.setattr(provenance, "code_digest", lambda: "f" * 64)
    with pytest.raises(ConfigError, match=rf"began under .* \(code {here[:12]}\).*runtime.accept_code_change=true"):
        provenance.require_same_code(ledger, accept=False)
    assert len(read_ledger(ledger.path)) == 1
    provenance.require_same_code(ledger, accept=True)
    provenance.require_same_code(ledger, accept=False)  # it is the run's own now
    assert [line["digest"] for line in read_ledger(ledger.path)] == [here, "f" * 64]
    ledger.close()


def test_plan_reports_every_problem_at_once_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    code = main(plan(f"data.forget={tmp_path}/none.txt", "encoder.name=resnet19", "encoder.args={}", out=out))
    said = capsys.readouterr()
    assert code == 3 and said.out == "" and not out.exists()
    assert "none.txt" in said.err and "resnet19" in said.err and "Traceback" not in said.err


# -- the command line ------------------------------------------------------------------------------------------------

OPTIONS = {
    "prepare": "--out --config --set", "pretrain": "--out --config --set", "unlearn": "--out --config --set",
    "audit": "", "report": "", "run": "--out --previous --seeds --config --set",
    "pool": "--out", "purge": "--apply --no-apply", "status": "",
    "plan": "--out --previous --config --set", "list": "", "launch-files": "", "doctor": "--out --config --set",
    "index": "--config --set", "dose": "", "keygen": "", "certify": "--key --previous",
    "commit": "--out --previous --config --set", "countersign": "--key --register --reference",
    "receipt": "--id --out", "residuals": "", "dispose": "--key --apply --no-apply", "revoke": "--reason --key --out",
    "find": "--config --count --image --run --set",
    "init": "--checkpoint --encoder --images --non-members --request",
    "schema": "",
    "convert": "--args --image-size --in-chans --name --out --prefix --to",
    "verify": (
        "--trust --commitment --register --revocations --previous --timestamps --tsa --disposal --receipt --image "
        "--export --run --secret --shards --replay"
    ),
    "submit": (
        "--out --config --previous --set --account --array --constraint --container --container-image --cpus --dry-run "
        "--no-dry-run --exclude --gpu-type --gpus --logs --mail-type --mail-user --memory --name --nodes --partition "
        "--qos --requeues --reservation --sbatch --setup --tasks --time --warning"
    ),
    "sweep": (
        "--out --config --set --account --array --attacks --constraint --container --container-image --cpus --dry-run "
        "--no-dry-run --exclude --gpu-type --gpus --jobs --logs --mail-type --mail-user --memory --methods --name "
        "--nodes --no-report --no-submit --no-task --partition --processes --qos --report --requeues --reservation "
        "--sbatch --search --search-seed --seeds --setup --submit --task --tasks --time "
        "--trials --validation-seed --warning"
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", sorted(OPTIONS))
def test_options_are_those_that_scripts_rely_on(verb, capsys):
    assert main([verb, "--help"]) == 0
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)))
    expected = {*OPTIONS[verb].split(), "--json"}
    assert expected <= found
    assert found - expected - {"--help"} <= {"--no-apply"}


def test_verbs_are_those_that_scripts_rely_on():
    assert set(OPTIONS) == set(NAMES)


def without_help(verb: type) -> list[str]:
    """Arguments of a verb that `--help` says nothing about."""
    found = []
    for name, hint in typing.get_type_hints(verb, include_extras=True).items():
        said = [mark for mark in getattr(hint, "__metadata__", ()) if hasattr(mark, "help")]
        found += [name] if not any(mark.help or mark.name == "" for mark in said) else []
    return found


@pytest.mark.parametrize("verb", sorted(NAMES))
def test_every_argument_has_a_help_text(verb):
    assert NAMES[verb].__doc__ and without_help(NAMES[verb]) == []


def test_an_argument_without_help_is_seen():
    assert without_help(dataclasses.make_dataclass("Verb", [("some", int)])) == ["some"]


# -- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "quo'te\"s", "$(touch executed); `x`", "ünïcödé 漢", "-dash", "new\nline"])
def test_hostile_names_are_folders_like_any_other_or_refused(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)  # whatever would start a program fails
    out = tmp_path / name
    code = main(plan(out=out, verb="prepare"))
    assert code == 0 and (out / "shards/index.arrow").exists()
    shards = main(plan(f"data.shards={out}/shards", out=tmp_path / "x", verb="plan"))
    assert shards == (2 if "\n" in name else 0)
    said = capsys.readouterr().err
    assert "control character" in said if "\n" in name else "error" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_loop_of_links_is_refused(tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    code = main(plan("data.source=imagefolder", f"data.root={loop}", "data.members=null", out=tmp_path / "run"))
    assert code in (2, 3) and "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- no network ------------------------------------------------------------------------------------------------------


def test_names_of_a_hub_are_not_looked_up(monkeypatch, capsys, tmp_path):
    def connect(*args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with pytest.raises(AssertionError):
        socket.create_connection(("127.0.0.1", 9))  # the fault would be seen
    backbone = create_backbone(load_config("digits_vit", None, []).encoder)  # a timm name: fresh weights
    assert backbone.num_features == 96
    for name in ("hf-hub:timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k", "resnet18.a1_in1k.safetensors"):
        assert main(plan(f"encoder.checkpoint={name}", out=tmp_path / "run")) == 2
        assert "encoder.checkpoint" in capsys.readouterr().err


# -- results that must not move --------------------------------------------------------------------------------------

# First pretraining losses of random images under each recipe, on torch 2.14 for the CPU.
GOLDEN = {
    "digits": 3.876678705215454,
    "digits_byol": 4.120515823364258,
    "digits_moco": 2.734494209289551,
    "digits_mocov3": 2.1900634765625,
    "digits_supervised": 2.339879274368286,
    "digits_vit": 4.4386091232299805,
    "fashion_mnist": 3.7717530727386475,
}


def first_loss(recipe: str) -> float:
    cfg = load_config(recipe, None, [])
    classes = 10 if cfg.objective.name == "supervised" else None
    model, objective = build_model(cfg, classes), make_objective(cfg.objective)
    momentum = MomentumEncoder(model) if objective.needs_momentum else None
    queue = KeyQueue(cfg.objective.queue_size, cfg.objective.output_dim) if objective.uses_queue else None
    if queue is not None:
        keys = torch.randn(64, cfg.objective.output_dim, generator=torch.Generator().manual_seed(1))
        queue.push(torch.nn.functional.normalize(keys, dim=1), torch.arange(64))
    ctx = Context(cfg, objective, model, model, torch.device("cpu"), momentum=momentum, queue=queue)
    side, generator = cfg.encoder.image_size, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, cfg.encoder.in_chans, side, side), generator=generator, dtype=torch.uint8)
    ids = [f"image-{number}" for number in range(16)]
    batch = photo_batch(ids, images, np.zeros(16, dtype=np.int64), torch.arange(16) % 10)
    return float(Pretrain(cfg).loss(ctx, {"members": batch}).loss.detach())


@pytest.mark.parametrize("recipe", sorted(name for name in RECIPES if not name.startswith("photos")))
def test_the_first_loss_of_a_recipe_is_what_it_was(recipe):
    """Within 1e-4, relative: other builds sum in another order. The same build gives the same bits twice."""
    found = first_loss(recipe)
    assert found == first_loss(recipe)
    assert found == pytest.approx(GOLDEN[recipe], rel=1e-4)


ORDER = """
import hashlib, torch
from distunlearn.data.schedule import permutation, random_words
text = repr([permutation(1000, 3, "retain", epoch).tolist() for epoch in range(3)])
text += repr(random_words(50, 7, "image-3", 0).tolist())
x = torch.sin(torch.arange(4_000_000, dtype=torch.float32)).reshape(2000, 2000)
sums = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    sums.append((float((x @ x).sum()), float(x.exp().sum())))
print(hashlib.sha256(text.encode()).hexdigest(), *(a for pair in sums for a in pair))
"""


def test_neither_hash_seed_nor_threads_change_the_order():
    """Sums over 4 million terms on one thread and on two agree within 1e-4."""
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(provenance.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", ORDER], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    found, *numbers = done.stdout.split()
    text = repr([permutation(1000, 3, "retain", epoch).tolist() for epoch in range(3)])
    text += repr(random_words(50, 7, "image-3", 0).tolist())
    assert found == hashlib.sha256(text.encode()).hexdigest()
    one, two = np.array(numbers, dtype=float).reshape(2, 2)
    assert np.allclose(one, two, rtol=1e-4)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_memory_that_is_not_there_ends_in_one_sentence_and_resumes(tmp_path, monkeypatch, capsys):
    """torch is asked for more than any machine has, in mid-training; a GPU's error is of a class of its own."""
    real, fired = Training.loss, []

    def greedy(self, ctx, batches):
        if ctx.step == 3 and not fired:
            fired.append(ctx.step)
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(self, ctx, batches)

    out = tmp_path / "run"
    assert main(plan(out=out, verb="prepare")) == 0
    monkeypatch.setattr(Training, "loss", greedy)
    assert main(plan(out=out, verb="pretrain")) == 2 and fired
    told = capsys.readouterr().err
    assert "ran out of memory" in told and "runtime.activation_checkpointing=true" in told and "Traceback" not in told
    assert main(plan(out=out, verb="pretrain")) == 0
    assert ended(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")) == 2
    assert "this process ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in capsys.readouterr().err
    assert ended(RuntimeError("another one")) == 70
