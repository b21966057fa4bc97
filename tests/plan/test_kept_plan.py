"""The plan beside a run is that of its first start."""

from __future__ import annotations

import json

from distunlearn.plan.plan import write_plan


def test_a_plan_of_the_same_settings_stays_and_others_and_damaged_ones_are_written_anew(tmp_path):
    path = tmp_path / "plan.json"
    write_plan({"digest": "a", "looked_at": 96}, tmp_path)
    write_plan({"digest": "a", "looked_at": 216}, tmp_path)  # a resumed run, whose shards are there
    assert json.loads(path.read_text())["looked_at"] == 96
    write_plan({"digest": "b", "looked_at": 216}, tmp_path)
    assert json.loads(path.read_text()) == {"digest": "b", "looked_at": 216}
    path.write_text('{"digest"')
    write_plan({"digest": "b", "looked_at": 7}, tmp_path)
    assert json.loads(path.read_text())["looked_at"] == 7
