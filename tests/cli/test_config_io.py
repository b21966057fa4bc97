"""Configs: what is refused, what the refusal says, and that what is written reads back the same."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
from dataclasses import replace
from pathlib import Path

import pytest

from distunlearn.config import recipes
from distunlearn.config.checks import cross_checks
from distunlearn.config.load import load_config, save_config
from distunlearn.config.registry import KINDS, METHOD, OBJECTIVE, settings_of
from distunlearn.config.schema import DataConfig, EncoderConfig, PretrainConfig, RunConfig, RuntimeConfig
from distunlearn.config.shape import digest, field_diff, known_keys, part_keys
from distunlearn.errors import ConfigError


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def load(*overrides: str, recipe: str | None = "digits", file: Path | None = None, world: int = 1) -> RunConfig:
    return load_config(recipe, file, list(overrides), world=world)


def refusal(*overrides: str, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


# Layers


def test_recipe_then_file_then_overrides(write):
    file = write("seed: 3\npretrain:\n  lr: 1e-3\n  epochs: 7\n")
    cfg = load("pretrain.epochs=9", "seed=4", "seed=5", file=file)
    assert (cfg.seed, cfg.pretrain.lr, cfg.pretrain.epochs) == (5, 1e-3, 9)
    assert cfg.objective == recipes.digits().objective


def test_every_recipe_loads_as_it_is_written():
    for name, recipe in recipes.RECIPES.items():
        found = load("data.root=/x", recipe=name)
        assert field_diff(found, replace(recipe(), data=replace(recipe().data, root="/x"))) == {}
        assert found.recipe == name


def test_the_recipe_may_be_named_in_the_file(write):
    assert load(recipe=None, file=write("recipe: digits\nseed: 2")).seed == 2
    assert load(recipe=None, file=write("")).recipe == RunConfig().recipe


def test_a_recipe_in_the_file_that_contradicts_the_command_is_refused(write):
    assert "digits was asked for" in refusal(file=write("recipe: fashion_mnist"))


def test_unknown_recipe_names_the_nearest(write):
    assert "did you mean digits?" in refusal(recipe="digit")
    assert "run.yaml: unknown recipe 7" in refusal(recipe=None, file=write("recipe: 7"))


def test_recipe_is_not_a_value_to_set():
    assert "not with --set" in refusal("recipe=digits_vit")
    assert load("recipe=digits").recipe == "digits"


def test_a_free_dict_is_replaced_by_a_file_and_changed_by_set(write):
    file = write("encoder:\n  args: {layers: [1, 1, 1, 1]}\n")
    assert load(file=file).encoder.args == {"layers": [1, 1, 1, 1]}
    assert load("encoder.args.stem_width=4", file=file).encoder.args == {"layers": [1, 1, 1, 1], "stem_width": 4}


def test_home_is_expanded_in_paths_only():
    cfg = load("data.shards=~/shards", "data.forget=~/ids.txt")
    assert cfg.data.shards == os.path.expanduser("~/shards")
    assert cfg.data.forget == os.path.expanduser("~/ids.txt")


def test_values_of_set_are_whole():
    assert load("data.root=/data/a b #1: 'c'").data.root == "/data/a b #1: 'c'"
    assert load("data.root='5'").data.root == os.path.abspath("5")  # text, and a path that holds from any folder
    assert load("data.root=").data.root is None
    assert load("encoder.embed_dim=null").encoder.embed_dim is None


# Unknown keys


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("pretrain.lrr=1", "pretrain.lr"),
        ("bakend=ddp", "backend"),
        ("optim.lrr=1", "pretrain.lr or unlearn.lr"),
        ("pretran.epochs=2", "pretrain.epochs"),
        ("lr=1", "pretrain.lr or unlearn.lr"),
        ("audit.gate.attack=1", "audit.gates.attack"),
        ("seed.x=1", "seed"),
    ],
)
def test_unknown_key_names_origin_path_and_nearest(override, nearest):
    message = refusal(override)
    key = override.partition("=")[0]
    assert message == f"--set {override}: unknown key {key}; did you mean {nearest}?"


def test_unknown_key_in_a_file_names_the_file(write):
    file = write("pretrain:\n  lrr: 1\n")
    assert refusal(file=file) == f"{file}: unknown key pretrain.lrr; did you mean pretrain.lr?"


def test_a_key_like_nothing_lists_what_there_is():
    assert "expected one of recipe, seed" in refusal("zzz=1")


def test_target_is_just_an_unknown_key(write, tmp_path):
    marker = tmp_path / "executed"
    message = refusal(file=write(f"_target_: os.system\n_args_: [touch {marker}]\n"))
    assert "unknown key _target_" in message and "unknown key _args_" in message
    assert not marker.exists()


@pytest.mark.parametrize("text", ["foo", "=1", "a..b=1", "seed", ".seed=1", "se ed=1"])
def test_malformed_override(text):
    assert "expected key=value" in refusal(text)


def test_every_known_key_is_accepted_with_its_own_value():
    for key in known_keys():
        chosen = owner(key)
        value = operator.attrgetter(key)(load(*chosen))
        text = json.dumps(value)
        if not isinstance(value, dict):
            assert field_diff(load(*chosen, f"{key}={text}"), load(*chosen)) == {}, key


def owner(key: str) -> list[str]:
    """The setting that chooses a part which has this key; nothing for keys that every run has."""
    for kind in KINDS:
        having = part_keys(kind).get(key, [])
        if having and key != kind.setting:
            return [f"{kind.setting}={having[0]}"]
    return []


# Settings of the parts that are named


def test_a_key_of_another_part_is_refused_with_its_owners_and_the_nearest_key():
    message = refusal("method.name=finetune", "method.gradient_weight=2")
    assert message == (
        "--set method.gradient_weight=2: unknown key method.gradient_weight with method.name=finetune (it is a setting "
        "of third_party); expected one of name, dose, loss_bound, embedding_bound"
    )
    message = refusal("method.name=scrub", "method.retain_wight=2")
    assert "unknown key method.retain_wight with method.name=scrub; did you mean method.retain_weight?" in message
    assert "(it is a setting of input_gp)" in refusal("constraint.center=0")
    assert "(it is a setting of moco)" in refusal("objective.queue_size=64")
    assert "did you mean method.output_weight?" in refusal("method.outputweight=1")


def test_what_the_recipe_sets_for_its_own_part_goes_and_what_both_have_stays():
    cfg = load("method.name=scrub", "objective.name=moco")
    assert cfg.method == settings_of(METHOD, "scrub") and load().method.output_weight == 0.13
    assert cfg.objective == settings_of(OBJECTIVE, "moco", hidden_dim=256) and load().objective.hidden_dim == 256
    assert load("constraint.evaluator=sketch").constraint.view_pairs == load().constraint.view_pairs == 2


def test_what_a_file_sets_is_refused_unless_the_file_is_about_another_part(write):
    file = write("method:\n  gradient_weight: 2.0\n")
    assert load(file=file).method.gradient_weight == 2.0
    assert "unknown key method.gradient_weight with method.name=finetune" in refusal("method.name=finetune", file=file)
    whole = write("method:\n  name: third_party\n  gradient_weight: 2.0\n  loss_bound: 9.0\n")
    assert load("method.name=third_party", file=whole).method.gradient_weight == 2.0
    cfg = load("method.name=finetune", file=whole)
    assert cfg.method == settings_of(METHOD, "finetune", loss_bound=9.0)  # a setting of every method
    own = write("method:\n  name: finetune\n  gradient_weight: 2.0\n")
    assert "unknown key method.gradient_weight with method.name=finetune" in refusal(file=own)
    assert "unknown key method.gradient_weight" in refusal(
        "method.name=finetune", "method.gradient_weight=2", file=whole
    )


def test_a_saved_run_of_another_method_is_a_config_file(tmp_path):
    save_config(load("method.output_weight=3"), tmp_path / "run.yaml")
    cfg = load("method.name=sure", file=tmp_path / "run.yaml")
    assert cfg.method == settings_of(METHOD, "sure")


def test_a_name_that_is_no_part_gets_the_nearest():
    assert (
        refusal("method.name=scrubb")
        == "--set method.name=scrubb: method.name=scrubb is not known; did you mean scrub?"
    )
    assert "did you mean sketch?" in refusal("constraint.evaluator=sktch")
    assert "method.name=3 is not known" in refusal("method.name=3")


# Types and ranges


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain.lr=1e-3x", 'found "1e-3x", expected a valid number'),
        ("pretrain.lr=true", "found true, expected a valid number"),
        ("pretrain.epochs=true", "found true, expected a valid integer"),
        ("pretrain.epochs=3.0", "found 3.0, expected a valid integer"),
        ("encoder.in_chans=true", "found true, expected 1 or 3"),
        ("encoder.in_chans=1.0", "found 1.0, expected 1 or 3"),
        ("encoder.in_chans=2", "found 2, expected 1 or 3"),
        ("encoder.embed_dim=true", "found true, expected a valid integer"),
        ("sync_batchnorm=1", "found 1, expected a valid boolean"),
        ("sync_batchnorm=yes", 'found "yes", expected a valid boolean'),
        ("data.forget=true", "found true, expected a valid integer or a valid number or a valid string"),
        ("encoder.name=123", "found 123, expected a valid string"),
        ("encoder.args=[1]", "found [1], expected an object"),
        ("objective.name=simcl", "did you mean simclr?"),
        ("pretrain.lr=nan", 'found "nan"'),
        ("pretrain.lr=.inf", 'found ".inf"'),
        ("pretrain.lr=1e999", "1e999 is too large"),
        ("pretrain.lr=-1", "found -1, expected greater than 0"),
        ("objective.temperature=0", "found 0, expected greater than 0"),
        ("pretrain.batch=0", "found 0, expected greater than 0"),
        ("unlearn.steps=0", "found 0, expected greater than 0"),
        ("unlearn.forget_batch=1", "found 1, expected greater than or equal to 2"),
        ("views.flip=1.5", "found 1.5, expected less than or equal to 1"),
        ("seed=-1", "found -1"),
        ("seed=4294967296", "at most 4294967295"),
        ("seed=" + "9" * 5000, "too long"),
        ("pretrain=3", "expected a group of settings; set one of them, such as pretrain.accumulate"),
        ("audit.stress=canaries", "expected a valid array; write it as a list, such as [canaries]"),
        ("backend=dpp", "did you mean ddp?"),
    ],
)
def test_wrong_values_show_what_was_found_and_expected(override, expected):
    message = refusal(override)
    assert expected in message
    assert override.partition("=")[0] in message
    assert "\n" not in message


def test_no_field_that_is_not_boolean_accepts_one():
    """bool is an int in Python; every key is tried."""
    for key in known_keys():
        chosen = owner(key)
        if key == "recipe" or isinstance(operator.attrgetter(key)(load(*chosen)), bool):
            continue
        with pytest.raises(ConfigError, match="found true|=true is not known|=True is not known"):
            load(*chosen, f"{key}=true")


def test_no_number_may_be_infinite_or_nan():
    """Python callers can hand over what YAML cannot spell."""
    for value in (float("nan"), float("inf")):
        for field in ("lr", "warmup", "clip", "weight_decay"):
            broken = dataclasses.replace(RunConfig(), pretrain=dataclasses.replace(PretrainConfig(), **{field: value}))
            with pytest.raises(ValueError):
                digest(broken)


def test_a_section_must_be_a_section(write):
    file = write("pretrain:\ndata: 5\n")
    message = refusal(file=file)
    assert "pretrain: found null, expected a group of settings" in message
    assert "data: found 5, expected a group of settings" in message


def test_a_file_must_hold_settings(write):
    assert "found [1], expected settings" in refusal(file=write("[1]"))


def test_all_problems_are_reported_together(write):
    file = write("pretrain:\n  lrr: 1\nbackend: dpp\n")
    message = refusal(
        "views.hue=0.1", "unlearn.steps=0", "constraint.evaluator=sketch", "constraint.layers=(", file=file
    )
    assert message.startswith("5 problems in the configuration:")
    assert message.count("\n  - ") == 5
    for part in ("pretrain.lrr", "ddp?", "views.hue", "unlearn.steps", "constraint.layers"):
        assert part in message


def test_a_refused_value_draws_no_second_complaint():
    """members=abc falls back to 900 for the later checks, but 1000 to forget must not be blamed on that."""
    assert "leaves nothing" not in refusal("data.members=abc", "data.forget=1000")
    assert "leaves nothing" in refusal("data.forget=1000")


# Checks across settings


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["constraint.evaluator=sketch", "constraint.layers=("], "expected a regular expression"),
        (["constraint.evaluator=double_backward", "backend=fsdp2"], "set constraint.evaluator=sketch, or backend=ddp"),
        (["data.source=cifar10"], "needs data.root"),
        (["data.third_party_source=fasion_mnist"], "did you mean fashion_mnist?"),
        (["data.third_party_source=stl10"], "needs data.third_party_root"),
        (["data.third_party_root=/x"], "without data.third_party_source"),
        (["data.forget=0"], "nothing to forget"),
        (["data.forget=900"], "leaves nothing of data.members=900"),
        (["data.forget=1.5"], "a share between 0 and 1"),
        (["data.forget=class: "], "such as class:3"),
        (["data.forget=ids.xlsx"], "a file of ids (.txt, .csv, .tsv, .jsonl)"),
        (["pretrain.batch=901"], "larger than data.members=900"),
        (["unlearn.retain_batch=701"], "the 700 images to retain"),
        (["unlearn.third_party_batch=251"], "larger than data.third_party=250"),
        (["pretrain.batch=1"], "at least 2"),
        (["encoder.name=' '"], "encoder.name is empty"),
        (["encoder.checkpoint=/nowhere/a.safetensors"], "is not a file"),
        (["views.saturation=0.1"], "needs colour"),
        (["views.grayscale=0.1"], "needs colour"),
        (["objective.name=moco", "objective.queue_size=64"], "enlarge the queue"),
        (['data.root="/a\\nb"'], "control character"),
    ],
)
def test_settings_that_exclude_one_another(overrides, expected):
    assert expected in refusal(*overrides)


@pytest.mark.parametrize("name", ["simclr", "moco", "mocov3", "byol", "supervised"])
def test_every_objective_passes(name):
    assert load(f"objective.name={name}").objective.name == name


@pytest.mark.parametrize("forget", ["1", "0.2", "class:3", "ids.csv", "/a/b c.JSONL"])
def test_ways_to_say_what_to_forget(forget):
    load(f"data.forget={forget}")


def test_colour_views_need_colour_only_when_used():
    load("encoder.in_chans=3", "views.hue=0.1", "views.saturation=0.4")


def test_supervised_needs_class_folders(tmp_path):
    overrides = ["data.source=imagefolder", f"data.root={tmp_path}"]
    assert "needs labels" in refusal("objective.name=supervised", *overrides)
    assert load(*overrides).objective.name == "simclr"
    (tmp_path / "cats").mkdir()
    load("objective.name=supervised", *overrides)


def test_batches_are_shared_equally():
    even = ["backend=ddp", "unlearn.forget_batch=64", "unlearn.third_party_batch=64"]
    load(*even, world=2)
    message = refusal(*even, "pretrain.batch=100", world=8)
    assert message == "pretrain.batch=100 cannot be shared equally by 8 processes; set it to 96 or 104"
    assert "set it to 4" in refusal(*even, "unlearn.retain_batch=2", world=4)
    assert "backend=single cannot use 2 processes" in refusal(world=2)


def test_micro_batches_are_equal_and_hold_images_to_compare():
    even = ["unlearn.retain_batch=120", "unlearn.forget_batch=60", "unlearn.third_party_batch=60"]
    load(*even, "unlearn.accumulate=4", "pretrain.accumulate=4")
    load(*even, "backend=ddp", "unlearn.accumulate=2", world=2)
    assert refusal("pretrain.accumulate=3") == (
        "pretrain.batch=128 cannot be shared equally by 3 micro-batches (pretrain.accumulate); set it to 126 or 129"
    )
    both = refusal(*even, "backend=ddp", "unlearn.accumulate=4", "unlearn.forget_batch=44", world=2)
    assert "44 cannot be shared equally by 2 processes and 4 micro-batches (unlearn.accumulate); set it to 40" in both
    alone = refusal(*even, "unlearn.accumulate=60")
    assert "unlearn.forget_batch=60 leaves 1 image to each of unlearn.accumulate=60 micro-batches" in alone


def test_the_world_is_the_launchers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="backend=single cannot use 2 processes"):
        load_config("digits", None, [])
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        load_config("digits", None, [])


def test_cross_checks_of_a_config_made_in_python():
    assert cross_checks(load()) == []
    cfg = RunConfig(encoder=EncoderConfig(name=" "), data=DataConfig(source="stl10"))
    assert len(cross_checks(cfg)) == 2


@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_what_zero3_would_cut_into_pieces_is_not_compiled(backend):
    cfg = replace(load(), backend=backend, runtime=RuntimeConfig(compile=True))
    found = ["set backend=fsdp2, or runtime.compile=false" in problem for problem in cross_checks(cfg)]
    assert found == ([True] if backend == "zero3" else [])
