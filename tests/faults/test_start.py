"""Before the first step: processes that cannot meet, or do not run the same, and what doctor says of a launch."""

from __future__ import annotations

import pickle
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import tiny
import torch
from sizes import SMALL

from distunlearn.config.schema import RunConfig, RuntimeConfig
from distunlearn.config.shape import marked
from distunlearn.distributed import process_group, rendezvous
from distunlearn.distributed.plain_data import decode, encode
from distunlearn.distributed.world import World
from distunlearn.engine import provenance
from distunlearn.engine.backends.base import Backend
from distunlearn.errors import ConfigError, LaunchError, RankLostError
from distunlearn.run.launch_check import sample_problems

PATIENCE = timedelta(seconds=2)

# -- meeting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def variables(monkeypatch):
    def set_to(**values: str) -> None:
        standard = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29507"}
        for name, value in (standard | values).items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("name", "value"),
    [("MASTER_ADDR", "no-such-node.invalid"), ("MASTER_ADDR", "a b"), ("MASTER_PORT", "70000"), ("RANK", "7")],
)
def test_a_variable_that_cannot_be_right_is_named_at_once(variables, name, value):
    variables(**{name: value})
    with pytest.raises(ConfigError, match=f"{name} is '?{value}"):
        process_group.join(RunConfig(backend="ddp", runtime=RuntimeConfig(threads=torch.get_num_threads())))


def test_a_port_in_use_is_named(variables):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        variables(MASTER_PORT=str(port))
        with pytest.raises(ConfigError, match=f"MASTER_PORT is {port}, which another program uses"):
            process_group.join(
                RunConfig(backend="ddp", runtime=RuntimeConfig(threads=torch.get_num_threads(), join_s=5.0))
            )


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_store_of_one_machine_listens_to_its_address_alone(variables, address):
    """127.0.0.2 is another address of this machine, which a store that listens everywhere answers at."""
    variables(MASTER_ADDR=address, MASTER_PORT=str(free_port()), TORCHELASTIC_USE_AGENT_STORE="False")
    store = rendezvous._store(0, PATIENCE)
    assert not answers("127.0.0.2", store.port)
    here = torch.distributed.TCPStore(address, store.port, is_master=False, timeout=PATIENCE)
    here.set("a", "b")
    assert store.get("a") == b"b"
    everywhere = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert answers("127.0.0.2", everywhere.port)  # control


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("WORLD_SIZE", ["2", "3"], "WORLD_SIZE is 3 for rank 1 and 2 for rank 0"),
        ("RANK", ["1", "1"], "did not find the others"),
    ],
)
def test_variables_that_contradict_one_another(zygote, copied, name, values, said):
    settings = tiny.settings(*SMALL, "backend=ddp", "runtime.join_s=4", "unlearn.retain_batch=30",
                             "unlearn.forget_batch=6", "unlearn.third_party_batch=6", "pretrain.batch=36")  # fmt: skip
    group = zygote.start(2, ["unlearn", "digits", "--out", str(copied), *settings], **{name: values})
    group.wait()
    told = [group.said(rank) for rank in (0, 1)]
    assert any(said in text and name in text for text in told), told
    assert max(group.seconds) < 40 and not any("Traceback" in text for text in told), told
    assert set(group.codes) <= {2, 5} and 0 not in group.codes


def test_a_rank_that_is_taken_is_refused():
    """Of three processes two say that they are rank 1."""
    told = meet_in_threads([0, 1, 1], 2)
    assert [str(error) for error in told if error] == [
        "RANK is 1 in two processes; give every process a rank of its own."
    ]


def meet_in_threads(ranks: list[int], world: int, tokens: dict[int, str] | None = None) -> list[Exception | None]:
    """What each of the processes of these ranks, played by a thread, ends the meeting with."""
    store = torch.distributed.HashStore()
    store.set_timeout(PATIENCE)

    def one(number: int) -> Exception | None:
        try:
            rendezvous._compare(store, ranks[number], world, PATIENCE, (tokens or {}).get(number, ""))
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, range(len(ranks))))


def test_processes_meet_with_and_without_a_token():
    assert meet_in_threads([0, 1, 2], 3) == [None] * 3
    assert meet_in_threads([1, 0], 2, {0: "of this launch", 1: "of this launch"}) == [None] * 2


@pytest.mark.parametrize(
    ("tokens", "said"),
    [({0: "a", 1: "a", 2: "b"}, "does not know the token of this launch"),
     ({0: "a", 1: "a"}, "DISTUNLEARN_LAUNCH_TOKEN is not set for rank 2 and not so for rank 0")],
)  # fmt: skip
def test_whoever_sits_in_as_a_rank_without_the_token_is_found_before_anything_is_sent(tokens, said):
    told = meet_in_threads([0, 1, 2], 3, tokens)
    assert any(said in str(error) for error in told), told
    assert all(isinstance(error, (LaunchError, RuntimeError, TimeoutError)) for error in told), told


def test_a_meeting_of_an_earlier_attempt_is_not_joined(monkeypatch):
    """torchrun's agents count restarts each for itself, and their store outlives the processes."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    store = torch.distributed.HashStore()
    store.set_timeout(PATIENCE)
    with ThreadPoolExecutor(2) as pool:
        for attempt in range(3):
            second = pool.submit(rendezvous._compare, store, 1, 2, PATIENCE, "")  # finds the meeting of before
            time.sleep(0.1)
            first = rendezvous._compare(store, 0, 2, PATIENCE, "")
            first.set("attempt", str(attempt))
            assert second.result().get("attempt") == str(attempt).encode()


def test_what_processes_tell_one_another_is_plain_data():
    """Numbers, texts, lists, dicts, arrays of numbers come back as they were; nothing else leaves."""
    sent = {"a": [1, 2.5, None, True, "ä\n"], "n": float("nan"), "x": np.arange(6, dtype=np.float32).reshape(2, 3),
            "i": np.int64(7), "empty": np.zeros((0, 3), dtype=np.int16), "d": {"y": {"z": []}}}  # fmt: skip
    found = decode(encode(sent))
    assert found["a"] == sent["a"] and found["d"] == sent["d"] and found["i"] == 7 and found["n"] != found["n"]
    for name in ("x", "empty"):
        assert found[name].dtype == sent[name].dtype and np.array_equal(found[name], sent[name])
    for value in ({1: 2}, [object()], {"a": {3}}, np.array([object()], dtype=object), b"bytes"):
        with pytest.raises(TypeError):
            encode(value)
    for data in (pickle.dumps(print), b'{"\\u0000array": ["|O", [1], "AAAAAAAAAAA="]}', b"\xff"):
        with pytest.raises(ValueError):
            decode(data)


# -- the same run ----------------------------------------------------------------------------------------------------


class _Two(World):
    """One of two ranks, whose other one reports what the test says."""

    def __init__(self, rank: int = 0, **others: str) -> None:
        super().__init__(rank, 2, torch.device("cpu"))
        object.__setattr__(self, "others", others)

    def gather_objects(self, value):
        return [value, {**value, **self.others}]


class _Manifest:
    fingerprint = "f1"


@pytest.mark.parametrize(
    ("key", "value"),
    [("code", "0.1 abc"), ("shards and roles", "f2"), ("torch", "2.11"), ("default dtype", "torch.float64"),
     ("precision", "bf16"), ("seed", 3)],
)  # fmt: skip
def test_a_rank_that_runs_something_else_is_refused(key, value):
    with pytest.raises(RankLostError) as caught:
        provenance.require_one_run(_Two(**{key: value}), RunConfig(), _Manifest())
    message = str(caught.value)
    assert message.startswith(f"rank 0 and rank 1 do not run the same ({key}: ") and repr(value) in message
    assert caught.value.agreed


def test_ranks_may_differ_in_what_changes_nothing():
    provenance.require_one_run(_Two(), RunConfig(), _Manifest())
    here = RunConfig(runtime=RuntimeConfig(threads=3, watchdog_s=1.0))
    there = RunConfig(runtime=RuntimeConfig(threads=8))
    keys = [provenance.settings(cfg).items() for cfg in (here, there)]
    differing = {key for key, _ in keys[0] ^ keys[1]}
    assert differing == {"runtime.threads", "runtime.watchdog_s"} <= set(marked(here, "local"))


def test_what_the_main_rank_refuses_is_refused_by_all():
    class Other(_Two):
        told = ["ConfigError", "no"]

        def broadcast_object(self, value):
            assert value is None
            return self.told

    other = Other(rank=1)
    with pytest.raises(ConfigError, match="no") as caught:
        other.on_main(lambda: 1)
    assert caught.value.agreed
    Other.told = ["OSError", "no"]
    with pytest.raises(RankLostError, match="OSError"):
        other.on_main(lambda: 1)
    Other.told = None
    assert other.on_main(lambda: 1) is None
    alone = World(0, 1, torch.device("cpu"))
    assert alone.on_main(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        alone.on_main(lambda: 1 // 0)


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_shows_what_a_launch_really_is(zygote, trained):
    settings = tiny.settings(*SMALL, "backend=ddp")
    group = zygote.start(2, ["doctor", "digits", "--out", str(trained), *settings])
    assert group.wait() == [0, 0], group.said() + group.said(1)
    told = group.said().partition("- launch:")[2]
    assert "world: 2 processes on 1 machines, backend ddp" in told
    for rank, pid in enumerate(group.pids):
        assert f"rank {rank}: process {pid} on " in told
    assert "samples: pretrain/members, first 2 steps: 32 + 32 images" in told
    assert "samples: unlearn/forget, first 2 steps: 8 + 8 images" in told
    assert told.rstrip().endswith("- problems of the launch:\n  none")
    norm, length = (float(told.split(f"{word} ")[1].split()[0]) for word in ("of norm", "weights by"))
    assert norm > 2 and length == pytest.approx(norm, rel=1e-2)  # a clipping at 1 would show
    assert group.said(1) == ""


def test_doctor_finds_a_clipping_that_nobody_asked_for(monkeypatch):
    from distunlearn.run import launch_check

    cfg = tiny_config()
    honest = launch_check._one_step(cfg, Backend(cfg, World(0, 1, torch.device("cpu"))))
    assert honest[0] == pytest.approx(honest[1], rel=1e-3) and honest[1] > 2

    class Clipping(Backend):
        def step(self) -> None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            super().step()

    length, norm = launch_check._one_step(cfg, Clipping(cfg, World(0, 1, torch.device("cpu"))))
    assert length == pytest.approx(1.0, rel=1e-2) and norm == pytest.approx(honest[1], rel=1e-6)


def tiny_config() -> RunConfig:
    from distunlearn.config.load import load_config

    return load_config("digits", None, [part for part in tiny.TINY], world=1)


WHOLE = {"retain": [["a", "b", "c", "d"], ["e", "f", "a", "b"]]}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([["a", "b"], ["e", "f"]], [["c", "d"], ["a", "b"]], []),
        ([["a", "b"], ["e", "f"]], [["a", "b"], ["e", "f"]], ["every rank has the same images", "seen by no rank"]),
        ([["a"], ["e"]], [["c"], ["a"]], ["shared out twice"]),
        ([["a", "b", "c"], ["e", "f"]], [["d"], ["a", "b"]], ["batches of unequal size ([3, 1])"]),
        ([["a", "b"], ["e", "f"]], [["c", "x"], ["a", "b"]], ["1 images enter that one process would not see"]),
    ],
)
def test_doctor_finds_samples_that_are_shared_out_wrongly(first, second, expected):
    problems = sample_problems([{"retain": first}, {"retain": second}], WHOLE)
    assert bool(problems) == bool(expected)
    for sentence in expected:
        assert any(sentence in problem for problem in problems), problems
