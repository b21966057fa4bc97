"""Names of attacks in the settings of the audit: a wrong one is refused, not silently left out."""

from __future__ import annotations

import pytest

from distunlearn.config.load import load_config
from distunlearn.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["audit.gates.also=[rmai]"], "audit.gates.also names 'rmai'.*did you mean rmia"),
        (["audit.gates.also=[view_agreement]"], "not an attack that it takes"),
        (["audit.gates.also=[rmia, alignment_gap]"], "alignment_gap, which has no power"),
        (["audit.gates.also=[part_crop]"], "audit.part_crops=0 leaves out"),
        (["audit.average=[bank_loss, bank_los]"], "audit.average names 'bank_los'.*did you mean bank_loss"),
        (["audit.average=[]"], "audit.average is empty"),
        (["audit.tier=0", "audit.gates.also=[encodermi_set]"], "set audit.tier=1"),
        (["audit.tier=3"], "expected 0, 1 or 2"),
        (["audit.shadows=5"], "greater than or equal to 6"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits", None, settings, world=1)


def test_accepted():
    cfg = load_config("digits", None, ["audit.gates.also=[rmia, part_crop]", "audit.part_crops=16"], world=1)
    assert cfg.audit.gates.also == ("rmia", "part_crop") and cfg.audit.tier == 1
