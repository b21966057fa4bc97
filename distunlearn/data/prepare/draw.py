"""The sources of a run, opened, and the roles of their images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from distunlearn.config.schema import DataConfig
from distunlearn.data.prepare.exclude import excluded_ids
from distunlearn.data.prepare.persons import read_persons
from distunlearn.data.prepare.roles import Drawn, draw_roles, is_list
from distunlearn.data.sources.image_folder import left_out
from distunlearn.data.sources.sources import Sources, names_by, open_sources


def open_and_draw(
    cfg: DataConfig, seed: int, foreign: bool = False, known: Mapping[str, str] | None = None
) -> tuple[Sources, Drawn]:
    """What `prepare` and `plan` begin with. Errors: see `draw_roles` and `open_sources`.

    foreign: see `draw_roles`. known: see `names_by`.
    """
    opened = open_sources(cfg)
    members = opened.members
    person = read_persons(cfg, ((source.samples, source.classes) for source in opened.all))
    names = None
    if cfg.forget_by == "person":
        names = [[person[sample_id]] if sample_id in person else [] for sample_id, _ in members.samples]
    elif is_list(cfg.forget):
        names = names_by(members, cfg.forget_by, known)
    excluded = excluded_ids(cfg, [sample_id for sample_id, _ in members.samples], names)
    drawn = draw_roles(
        members.samples, cfg, seed,
        None if opened.third_party is None else opened.third_party.samples,
        None if opened.holdout is None else opened.holdout.samples,
        names=names, excluded=excluded, classes=members.classes, skipped=left_out(members.skipped), foreign=foreign,
        person=person,
    )  # fmt: skip
    skipped = {"skipped_files": dict(opened.skipped)} if opened.skipped else {}
    return opened, replace(drawn, facts=drawn.facts | skipped)
