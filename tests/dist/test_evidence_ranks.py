"""Evidence of two processes: chain, coverage, certificate; steps are repeated by two processes, and not by one."""

from __future__ import annotations

import json

import pytest
import tiny
import zygote
from evidence_case import PASSPHRASE, Case

from distunlearn.verify.check import HOLDS, INCOMPARABLE
from distunlearn.verify.ledger import effective_states, read_ledger


class Ranks(Case):
    """The same with two processes for every command that trains."""

    def command(self, *args, codes=(0,)):
        if args[0] not in ("commit", "run") and "--replay" not in args:
            return super().command(*args, codes=codes)
        group = zygote.shared().start(2, list(map(str, args)), limit=150, DISTUNLEARN_PASSPHRASE=PASSPHRASE)
        assert set(group.wait()) <= set(codes), group.said(0)[-2000:] + group.said(1)[-2000:]
        return group


@pytest.mark.parametrize(
    ("backend", "extra"),
    [pytest.param("ddp", (), marks=pytest.mark.matrix), ("fsdp2", ("checkpoint.sharded=always",))],
)
def test_two_processes(tmp_path, backend, extra):
    case = Ranks(tmp_path).make(f"backend={backend}", *extra)
    lines = read_ledger(case.run / "ledger.jsonl")
    states = effective_states(lines, "unlearn")
    assert all(len(set(state["ranks"])) == 2 for step, state in states.items() if 0 < step < 6), "one head each"
    assert {line["world"] for line in lines if line["event"] == "start"} == {2}
    found = case.check()
    assert [check.word for check in found.checks[:3]] == [HOLDS] * 3, str(found)
    assert found.predicate.coverage.consumed_min >= 1
    argv = ["verify", case.path, "--trust", case.trust, "--run", case.run, "--shards", case.run / "shards"]
    group = case.command(*argv, "--replay", "1", "--json", codes=(0, 6, 7))
    said = group.said(0)
    words = [check["word"] for check in json.loads(said[said.index("{") : said.rindex("}") + 1])["checks"]]
    assert words[2:] == [HOLDS, HOLDS, HOLDS], said
    done = tiny.command(*map(str, argv), "--replay", "1", "--json")
    if done.returncode != 2:  # one process cannot be this backend, or rounds in another order
        assert [check["word"] for check in json.loads(done.stdout)["checks"]][4] == INCOMPARABLE, done.stdout
