"""Nobody leaves before the main process has written the report: launchers end all processes with the first."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from processes import launch

from distunlearn.config.load import load_config
from distunlearn.distributed.process_group import wait_for_all
from distunlearn.engine.backends import open_backend
from distunlearn.run import pipeline

INCONCLUSIVE = 7


def main() -> None:
    folder, waits = Path(sys.argv[1]), sys.argv[2] == "waits"
    if not waits:
        pipeline.wait_for_all = lambda: None
    started = []

    def slow_report(out: Path) -> None:
        time.sleep(2)
        (out / "report.html").write_text("evidence")

    pipeline.pretrain = lambda cfg, out, planned: started.append(open_backend(cfg))
    pipeline.unlearn = lambda cfg, out: started[0].world.barrier()
    pipeline.audit = lambda out, cfg: INCONCLUSIVE
    pipeline.report = slow_report
    out = folder / "run"
    code = pipeline.run(load_config("digits", None, ["backend=ddp", "runtime.threads=1"]), out)
    rank = started[0].world.rank
    torch.save({"code": code, "reported": (out / "report.html").exists()}, folder / f"rank-{rank}.pt")
    wait_for_all()


@pytest.mark.parametrize(("how", "expected"), [("waits", [True, True]), ("negative control", [True, False])])
def test_the_report_is_written_before_any_process_leaves(tmp_path, how, expected):
    ranks = launch(__file__, 2, tmp_path, how)
    assert [r["code"] for r in ranks] == [INCONCLUSIVE] * 2
    assert [r["reported"] for r in ranks] == expected


if __name__ == "__main__":
    main()
