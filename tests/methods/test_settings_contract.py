"""What every method, objective and evaluator keeps to with its settings and texts: a new one falls in by itself."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from parts import EVALUATORS, METHODS, OBJECTIVES

import distunlearn
from distunlearn.config.load import load_config
from distunlearn.config.registry import EVALUATOR, KINDS, METHOD, OBJECTIVE, Kind, fitting, owners
from distunlearn.config.schema import ConstraintConfig, MethodConfig, ObjectiveConfig
from distunlearn.config.shape import part_keys
from distunlearn.errors import ConfigError
from distunlearn.methods.base import NEEDS, Method
from distunlearn.methods.search_space import grid, random
from distunlearn.objectives import make_objective

BASES = {"method": MethodConfig, "objective": ObjectiveConfig, "constraint": ConstraintConfig}
CLASSES = {"method": METHODS, "objective": OBJECTIVES, "constraint": EVALUATORS}
PARTS = [(kind, name) for kind in KINDS for name in kind.table]
every_part = pytest.mark.parametrize(("kind", "name"), PARTS, ids=[f"{k.section}-{n}" for k, n in PARTS])
every_method = pytest.mark.parametrize("name", METHODS)


def load(*settings: str) -> Any:
    return load_config("digits", None, list(settings), world=1)


def own_keys(kind: Kind, name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(CLASSES[kind.section][name].Config)]


@every_part
def test_settings_are_a_frozen_class_of_its_own(kind, name):
    part = CLASSES[kind.section][name]
    assert part.name == name and not inspect.isabstract(part)
    settings = part.Config()
    assert isinstance(settings, BASES[kind.section]) and getattr(settings, kind.key) == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, kind.key, "another")
    assert type(getattr(load(f"{kind.setting}={name}"), kind.section)) is part.Config


@every_part
def test_a_key_that_it_lacks_is_refused_and_one_that_it_has_is_not(kind, name):
    keys = own_keys(kind, name)
    for key, having in part_keys(kind).items():
        short = key.removeprefix(f"{kind.section}.")
        if short == kind.key:
            continue
        value = getattr(CLASSES[kind.section][having[0]].Config(), short)
        settings = [f"{kind.setting}={name}", f"{key}={'null' if value is None else value}"]
        if short in keys:
            assert getattr(getattr(load(*settings), kind.section), short) == value
            continue
        with pytest.raises(ConfigError) as caught:
            load(*settings)
        said = str(caught.value)
        assert caught.value.exit_code == 2 and "\n" not in said
        assert f"unknown key {key} with {kind.setting}={name} (it is a setting of {', '.join(having)})" in said


@every_part
def test_a_misspelt_key_is_refused_with_the_nearest(kind, name):
    for key in own_keys(kind, name):
        if len(key) > 4:
            with pytest.raises(ConfigError, match=f"did you mean {kind.section}.{key}"):
                load(f"{kind.setting}={name}", f"{kind.section}.{key[:-1]}{key[-1] * 2}=1")


@every_part
def test_texts_are_short_and_own(kind, name):
    part = CLASSES[kind.section][name]
    assert 10 < len(part.summary) <= 100 and "\n" not in part.summary and not part.summary.endswith(".")
    others = {other.summary for key, other in CLASSES[kind.section].items() if key != name}
    assert part.summary not in others


def test_owners_of_a_key_are_those_that_have_it():
    assert owners(OBJECTIVE, "queue_size") == ["moco"] and owners(EVALUATOR, "center") == ["input_gp"]
    assert owners(METHOD, "loss_bound") == list(METHODS) and owners(METHOD, "nothing") == []


@every_method
def test_needs_feeders_and_space_agree(name):
    method = METHODS[name]
    assert set(method.needs) <= set(NEEDS) and 10 < len(method.report) <= 130 and not method.report.endswith(".")
    cfg = load(f"method.name={name}")
    assert set(method.needs) <= set(method.needs_for(cfg)) and not list(method.problems(cfg))
    if method.steps == "none":
        assert not method.space and not method.forgets
        return
    feeders = method(cfg).batch_sizes()
    assert set(feeders) == {need for need in method.needs if need in ("retain", "forget", "third_party")}
    assert method.forgets == ("forget" in feeders)
    for point in [*random(method.space, 3, 0, name), *grid(method.space, 50, 0, name)]:
        load(f"method.name={name}", *(f"{key}={value}" for key, value in point.items()))
    assert all(not key.startswith("method.") or key.split(".")[1] in own_keys(METHOD, name) for key in method.space)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_made_of_their_settings_alone(name):
    settings = fitting(OBJECTIVE, name, temperature=0.3, similarity_mib=0.5)
    objective = make_objective(settings)
    assert objective.settings == settings and objective.uses_bank >= objective.uses_queue
    assert (objective.head == "projector") == ({"hidden_dim", "output_dim"} <= set(own_keys(OBJECTIVE, name)))
    assert objective.needs_momentum == ("momentum" in own_keys(OBJECTIVE, name))
    assert objective.uses_queue == ("queue_size" in own_keys(OBJECTIVE, name))


@pytest.mark.parametrize("name", EVALUATORS)
def test_evaluators_with_a_step_have_its_settings(name):
    assert bool(EVALUATORS[name].steps) == ({"rho", "check_every"} <= set(own_keys(EVALUATOR, name)))


# No part's name is known to what uses it

ASKED = ("config", "data", "distributed", "encoders", "engine", "plan", "run", "cli", "report", "audit")
# Recipes, and what finds out how an encoder from elsewhere was trained and writes settings for it.
ELSEWHERE = {
    "config/registry.py", "config/recipes.py", "config/photo_recipes.py", "config/view_recipes.py",
    "encoders/recognise.py", "run/init.py", "run/init_text.py",
}  # fmt: skip
COMMON = {"none", "retrain", "third_party", "head", "sketch"}  # roles, phases and words besides


def named(text: str) -> list[str]:
    """Names of parts that the code spells out, and comparisons with the name that a config has."""
    wrong = []
    names = {name for kind in KINDS for name in kind.table} - COMMON
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and node.value in names:
            wrong.append(f"line {node.lineno}: {node.value!r}")
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                if ast.unparse(side).endswith((".method.name", ".objective.name", ".constraint.evaluator")):
                    wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    return wrong


def test_no_name_of_a_part_stands_in_what_uses_it():
    root, found = Path(distunlearn.__file__).parent, {}
    for room in ASKED:
        for path in sorted((root / room).rglob("*.py")):
            place = path.relative_to(root).as_posix()
            if place not in ELSEWHERE and (wrong := named(path.read_text(encoding="utf-8"))):
                found[place] = wrong
    assert found == {}
    assert named("if cfg.method.name == 'third_party': pass") and named("x = 'moco'")  # controls: both are noticed


def test_a_method_that_lacks_something_is_refused_by_its_base():
    class Half(Method):
        name = "half"

    with pytest.raises(TypeError, match="abstract method '?loss"):
        Half(load())
