"""The JSON schema of settings files takes what the command line takes, and refuses what belongs to another part."""

from __future__ import annotations

import json

import jsonschema
import pytest

from distunlearn.cli.main import main
from distunlearn.config.load import dump_config
from distunlearn.config.recipes import RECIPES
from distunlearn.config.registry import KINDS
from distunlearn.config.yaml import parse_yaml


@pytest.fixture(scope="module")
def schema() -> dict:
    from distunlearn.config.json_schema import settings_schema

    return settings_schema()


def faults(schema: dict, settings: dict) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(settings)]


def test_it_is_a_schema_and_the_command_prints_it(schema, capsys):
    jsonschema.Draft202012Validator.check_schema(schema)
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_accepted(schema, recipe):
    assert faults(schema, parse_yaml(dump_config(RECIPES[recipe]()), recipe)) == []


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in kind.table])
def test_every_part_is_accepted_by_its_name(schema, kind, name):
    assert faults(schema, {kind.section: {kind.key: name}}) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"pretrain": {"epoch": 3}},
        {"pretrain": {"epochs": "many"}},
        {"seed": -1},
        {"method": {"name": "finetune", "gradient_weight": 1.0}},
        {"method": {"name": "no_such_method"}},
        {"objective": {"name": "supervised", "queue_size": 64}},
    ],
)
def test_what_the_command_line_refuses_is_refused(schema, settings):
    assert faults(schema, settings)


def test_own_parts_and_settings_of_the_default_part_are_accepted(schema):
    assert faults(schema, {"method": {"name": "own/method.py:Dissolve", "weight": 0.5}}) == []
    assert faults(schema, {"method": {"gradient_weight": 1.0}}) == []  # of third_party, which is the default
