"""Two certified requests in turn, by the commands alone: the second certificate follows the first one."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from evidence_case import PASSPHRASE, REFERENCE, Case

from distunlearn.verify import envelope
from distunlearn.verify.check import FAILS, HOLDS


class Later(Case):
    """The next request to the encoder that another case left, by the same people."""

    def __init__(self, before: Case, folder) -> None:
        super().__init__(folder)
        self.before, self.trust, self.register = before, before.trust, folder / "register.jsonl"
        for name in ("operator", "officer"):
            shutil.copy(before.folder / name, folder)
        shutil.copy(before.register, self.register)

    def make(self, *extra: str) -> Case:
        forget = [part for value in extra for part in ("--set", value)]
        went_on = ["--previous", self.before.run, "--out", self.run, *forget]
        self.command("commit", *went_on)
        shutil.copy(self.run / "evidence/commitment.request.json", self.folder)
        self.command("countersign", self.folder / "commitment.request.json", "--key", self.folder / "officer",
                     "--register", self.register, "--reference", "ticket 18")  # fmt: skip
        sets = [part for value in self.declared() for part in ("--set", value)]
        self.command("run", *went_on, *sets, codes=(0, 6, 7))
        self.command("certify", self.run, "--key", self.folder / "operator")
        return self


@pytest.fixture(scope="module")
def later(case, tmp_path_factory) -> Later:
    made = Later(case, tmp_path_factory.mktemp("later"))
    made.make("data.forget=20", "audit.tier=0")
    return made


def verified(later: Later, *more: object) -> tuple[int, list[dict]]:
    done = later.command("verify", later.path, "--trust", later.trust, "--commitment", later.commitment, "--register",
                         later.register, *more, "--json", codes=(0, 6, 7, 8))  # fmt: skip
    return done.returncode, json.loads(done.stdout)["checks"]


def test_the_second_certificate_follows_the_first_at_levels_0_to_2(later):
    first, second = (envelope.read(path.read_bytes(), "certificate") for path in (later.before.path, later.path))
    parts = [found.statement["predicate"] for found in (first, second)]
    assert (parts[0]["sequence"], parts[1]["sequence"], parts[1]["previous"]) == (1, 2, first.digest)
    assert parts[1]["states"]["original"] == parts[0]["states"]["unlearned"]
    assert "chain.json" in parts[1]["private"], "what was forgotten earlier is committed to"
    code, checks = verified(later, "--previous", later.before.path, "--run", later.run, "--export",
                            later.run / "export")  # fmt: skip
    assert code != 8 and [check["word"] for check in checks[:3]] == [HOLDS] * 3, checks
    assert "follows certificate 1" in checks[0]["why"] and "request ticket 18" in checks[0]["why"]
    assert "1 try" in checks[0]["why"], f"{REFERENCE} is another request"


def test_another_certificate_before_it_breaks_the_chain(later, tmp_path):
    """The first one signed anew, and the second one given as its own predecessor."""
    other = tmp_path / "other.json"
    other.write_bytes(later.before.signed(lambda p: p["tool"].update(version="9")))
    for before in (other, later.path):
        code, checks = verified(later, "--previous", before)
        assert code == 8 and checks[0]["word"] == FAILS and "the chain is broken" in checks[0]["why"], checks


def test_an_encoder_in_between_is_not_gone_on_from(later, tmp_path):
    """The encoder that the first request left was exchanged before the second one began."""
    run = later.before.copy(tmp_path)
    for name in ("done.json", "training_state.safetensors"):
        shutil.copy(run / "original" / name, run)
    shutil.copytree(run / "original/export", run / "export", dirs_exist_ok=True)
    done = tiny.command("run", "--previous", str(run), "--out", str(tmp_path / "next"), "--set", "data.forget=20",
                        DISTUNLEARN_PASSPHRASE=PASSPHRASE)  # fmt: skip
    assert done.returncode == 3 and "is not the one that" in done.stderr, done.stderr[-1500:]
    assert not (tmp_path / "next" / "chain.json").exists()
