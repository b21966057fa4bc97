"""A checkpoint that two ranks wrote, each its own part, is read by other backends and numbers of processes.

The ranks run this file as a script: they train a toy under each backend, save it sharded, and load what the others
saved; the test reads the same files in one process.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import launch
from test_backends import opened
from toys import RATES, build, loss_of, optimizer_of

from distunlearn.config.schema import CheckpointConfig
from distunlearn.encoders.model import MomentumEncoder
from distunlearn.engine.backends.tensor_shards import whole
from distunlearn.engine.checkpoint.async_save import Saver, agreed_checkpoint
from distunlearn.engine.checkpoint.format import latest_checkpoint
from distunlearn.engine.checkpoint.tensors import OPTIMIZER, optimizer_state, read_state
from distunlearn.engine.ledger import Ledger
from distunlearn.engine.preemption import StopRequest

pytestmark = pytest.mark.slow

WRITERS = ("fsdp2", "zero3", "zero1", "ddp")
READERS = (("zero3", "fsdp2"), ("fsdp2", "zero3"), ("fsdp2", "zero1"), ("zero1", "ddp"), ("zero3", "zero3"))
STEPS = 2


def prepared(kind: str, seed: int = 0):
    backend = opened(kind)
    model = build("vit", seed=seed).to(backend.device)
    momentum = MomentumEncoder(build("vit", seed=seed + 1))
    forward = backend.prepare(model, optimizer_of(model, "adamw"), 0.0)
    backend.follow(momentum)
    return backend, model, momentum, forward


def held(backend, momentum) -> dict:
    average = {f"momentum.{name}": value for name, value in backend.full_state(momentum).items()}
    return {"weights": backend.full_state() | average, "moments": backend.optimizer_state()}


def train_and_save(kind: str, folder: Path) -> dict:
    """Two steps; the state gathered on every rank, and saved in pieces."""
    backend, model, average, forward = prepared(kind)
    momentum = average.model
    for step in range(STEPS):
        backend.set_learning_rate(RATES[step])
        backend.backward(loss_of(model, forward, step, 8))
        backend.step()
        backend.update_momentum(average, model, 0.5)
    ledger = Ledger(folder / f"ledger-{backend.world.rank}.jsonl")
    settings = CheckpointConfig(sharded="always")
    with Saver(folder / kind, backend, settings, ledger, StopRequest(folder), print) as saver:
        saver.save(
            STEPS,
            {"method.w": torch.full((5,), 7.0)},
            {"digest": kind, "world": backend.world.size, "phase": "unlearn", "ranks": []},
            momentum,
        )
        saver.wait()
    ledger.close()
    found = held(backend, momentum)
    backend.release()
    return found


def load(kind: str, folder: Path, writer: str) -> dict:
    """What a model with other weights has under `kind` after it read the checkpoint of `writer`."""
    backend, _, average, _ = prepared(kind, seed=5)
    momentum = average.model
    ledger = Ledger(folder / "ledger-0.jsonl", is_main=False)
    checkpoint = agreed_checkpoint(folder / writer, backend.world, ledger, print)
    state = read_state(checkpoint)
    before = held(backend, momentum)["weights"]
    for prefix, of in (("model.", None), ("momentum.", momentum)):
        backend.load_full_state({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}, of)
    backend.load_optimizer_state(optimizer_state(checkpoint))
    found = {"before": before, **held(backend, momentum)}
    backend.release()
    return found


def main(folder: Path) -> None:
    results = {kind: train_and_save(kind, folder) for kind in WRITERS}
    for kind, writer in READERS:
        results[f"{kind} reads {writer}"] = load(kind, folder, writer)
    rank = torch.distributed.get_rank()
    torch.save(results, folder / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, launch(__file__, 2, folder, timeout=280)


def same(found: dict, expected: dict) -> bool:
    if found["weights"].keys() != expected["weights"].keys():
        return False
    pairs = [(found["weights"][n], value) for n, value in expected["weights"].items()]
    a, b = (one["moments"]["state"] for one in (found, expected))
    assert a.keys() == b.keys() and len(a) > 10
    for name, entries in b.items():
        assert a[name].keys() == entries.keys() == {"step", "exp_avg", "exp_avg_sq"}
        pairs += [(whole(a[name][key]), value) for key, value in entries.items()]
    return all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("writer", WRITERS)
def test_each_rank_wrote_a_part_and_one_process_reads_the_whole(ranks, writer):
    folder, results = ranks
    expected = results[0][writer]
    assert same(results[1][writer], expected)
    checkpoint, _ = latest_checkpoint(folder / writer)
    assert (checkpoint.step, checkpoint.facts["world"], checkpoint.facts["sharded"]) == (STEPS, 2, True)
    files = checkpoint.facts["files"]
    assert sorted(files) == [f"state-0000{rank}-of-00002.safetensors" for rank in range(2)]
    for moments in (True, False):
        places = [entry["pieces"].items() for _, entry in sorted(files.items())]
        sizes = [sum(found[1] for n, found in of_rank if n.startswith(OPTIMIZER) == moments) for of_rank in places]
        # elements; zero1 cuts its groups, not its weights, in two
        assert min(sizes) > 0.4 * sum(sizes) or (writer, moments) == ("zero1", True)
    state = read_state(checkpoint)
    own = {n.removeprefix("model."): whole(t) for n, t in state.items() if n.startswith(("model.", "momentum."))}
    assert same({"weights": own, "moments": optimizer_state(checkpoint)}, expected)
    assert torch.equal(whole(state["method.w"]), torch.full((5,), 7.0))
    assert {n.split(".")[0] + "." for n in state} == {"model.", "momentum.", "method.", OPTIMIZER}
    alone = load("single", folder, writer)
    assert same(alone, expected)
    for part in ("momentum.", ""):  # controls: the reader began elsewhere
        begun = {n: v for n, v in alone["before"].items() if n.startswith(part)}
        assert not same({**alone, "weights": alone["weights"] | begun}, expected)


@pytest.mark.parametrize(("kind", "writer"), READERS)
def test_two_ranks_of_another_backend_read_it(ranks, kind, writer):
    _, results = ranks
    for rank in results:
        assert same(rank[f"{kind} reads {writer}"], results[0][writer])


def test_a_part_of_another_step_is_refused(ranks, tmp_path):
    """Swapping in a file that a rank wrote under the same name at another time: shapes fit, digests do not."""
    folder, _ = ranks
    shutil.copytree(folder / "fsdp2", tmp_path / "fsdp2")
    name = "state-00001-of-00002.safetensors"
    place = tmp_path / "fsdp2" / "step-00000002"
    shutil.copytree(place, tmp_path / "fsdp2" / "step-00000001")
    content = bytearray((place / name).read_bytes())
    content[-3] ^= 1  # another training's weights
    (place / name).write_bytes(bytes(content))
    with pytest.raises(Exception, match="none of the checkpoints step-00000002, step-00000001"):
        latest_checkpoint(tmp_path / "fsdp2")  # the copy says step 2 itself, and is no checkpoint of step 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
