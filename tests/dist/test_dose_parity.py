"""The choice of a dose on 2 processes against one: the same images, figures, dose and weights, from the same two ends.

The ranks run this file as a script. Pieces are small, so that a rank sees several of them and some are filled up.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from processes import launch
from safetensors.torch import load_file

from distunlearn.config.load import load_config
from distunlearn.engine.dose import looks
from distunlearn.engine.dose.settle import settle_dose
from distunlearn.engine.session import open_session
from distunlearn.run import pipeline

pytestmark = pytest.mark.slow

RECIPE = "digits_moco"  # with a momentum encoder, a bank of keys and a queue
LIMIT = 1e-4
SETTINGS = [
    *tiny.TINY, "data.watch=24", "dose.grid=[0,0.5,1]", "dose.views=2", "dose.loss_share=1e9", "dose.knn_points=100",
]  # fmt: skip
PIECE = 8
MISTAKES = {
    "order of the images": ("_in_order", lambda rows, count, world: rows[:count]),
    "images of one's own alone": ("all_gather_detached", lambda mine: torch.cat([mine, mine])),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Prepared, pretrained and unlearned with the whole dose, by one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    cfg = load_config(RECIPE, None, SETTINGS, world=1)
    pipeline.prepare(cfg, out)
    pipeline.pretrain(cfg, out)
    pipeline.unlearn(cfg, out)
    return out


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory) -> Path:
    return chosen(base, tmp_path_factory.mktemp("alone"), "single")


def chosen(base: Path, folder: Path, backend: str, mistake: str = "") -> Path:
    launch(__file__, 1 if backend == "single" else 2, folder, str(base), backend, mistake)
    return folder / "run"


def deviation(found: Path, expected: Path) -> float:
    """Largest difference of a figure of an image, in standard deviations of its column."""
    with np.load(found / "dose/scores.npz") as ours, np.load(expected / "dose/scores.npz") as theirs:
        parts = []
        for role in looks.ROLES:
            assert (ours[f"{role}_ids"] == theirs[f"{role}_ids"]).all()
            parts.append(np.abs(ours[role] - theirs[role]) / theirs[role].std((0, 1)))
    return max(float(part.max()) for part in parts)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_two_processes_choose_as_one(base, alone, tmp_path, backend):
    found = chosen(base, tmp_path, backend)
    assert deviation(found, alone) <= LIMIT
    ours, theirs = (json.loads((at / "done.json").read_text()) for at in (found, alone))
    assert (ours["dose"], ours["state"]) == (theirs["dose"], theirs["state"])
    with np.load(found / "dose/scores.npz") as scores, np.load(alone / "dose/scores.npz") as expected:
        np.testing.assert_array_equal(scores["right"], expected["right"])
        # The doses are told apart far more than the processes.
        spread = np.abs(scores["forget"][2] - scores["forget"][0]) / scores["forget"].std((0, 1))
    assert spread.max() > 100 * LIMIT
    start, end, weights = (load_file(at / "training_state.safetensors") for at in (base / "original", base, found))
    name = next(name for name in end if name.startswith("momentum.") and name.endswith("weight"))
    torch.testing.assert_close(weights[name], torch.lerp(start[name], end[name], ours["dose"]))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_negative_control(base, alone, tmp_path, mistake):
    assert deviation(chosen(base, tmp_path, "ddp", mistake), alone) > 100 * LIMIT


def rank_main(folder: Path, base: Path, backend: str, mistake: str) -> None:
    more = [f"data.shards={base / 'shards'}", f"backend={backend}", "method.dose=auto"]
    cfg = load_config(RECIPE, None, [*SETTINGS, *more], world=int(os.environ.get("WORLD_SIZE", "1")))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(looks, "PIECE", PIECE))
        if mistake:
            stack.enter_context(mock.patch.object(looks, *MISTAKES[mistake]))
        session = stack.enter_context(open_session(cfg, folder / "run"))
        settle_dose(session, base / "original", base, "of a test")
    torch.save({}, folder / f"rank-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
