"""YAML files of settings: what is refused, what a scalar means, and that what is dumped reads back."""

from __future__ import annotations

import pytest
from test_config_io import load, refusal

from distunlearn.config import yaml


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: 1\nseed: 2", 'line 2, column 1: not valid YAML (found duplicate key "seed"'),
        ("pretrain: {lr: 1, lr: 2}", 'found duplicate key "lr"'),
        ("pretrain: {lr: 1, 'lr': 2}", 'found duplicate key "lr"'),
        ("a: ! 5", "is not allowed"),
        ("%YAML 1.1\n---\nseed: 0x10", 'found "0x10", expected a valid integer'),
        ("a: _", "unknown key a"),
        ("1: 2", "unknown key 1"),
        ("null: 2", "unknown key null"),
        ("seed: !!python/object/apply:os.system ['true']", "tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("seed: !!int '1'", "tag 'tag:yaml.org,2002:int' is not allowed"),
        ("!!map {}", "is not allowed"),
        ("a: &x 1\nb: *x", "anchor &x is not allowed"),
        ("a: *x", "alias *x is not allowed"),
        ("a: " + "[" * 3000, "nested deeper"),
        ("a: [1", "line 1, column 6"),
        ("a: 1\n--- \nb: 2", "another document"),
        ("? [a]\n: b", "a key must be plain text"),
        ("a: 1e999", "too large"),
        ("a: \x07", "U+0007 at position 3"),
    ],
)
def test_yaml_that_is_refused(write, text, reason):
    file = write(text)
    message = refusal(file=file)
    assert message.startswith(str(file))
    assert reason in message


def test_alias_bomb_is_refused_at_the_first_anchor(write):
    lines = ['a0: &a0 ["x"]'] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert "anchor &a0 is not allowed" in refusal(file=write("\n".join(lines)))


def test_merge_keys_do_not_merge(write):
    assert "unknown key <<" in refusal(file=write("<<: {seed: 3}"))


def test_large_files_are_refused(write):
    line = b"# 0123456789012345678901234567890\n"
    assert "at most 1048576 bytes" in refusal(file=write(line * (yaml.MAX_BYTES // len(line) + 1)))


def test_exactly_the_limit_is_read(write):
    assert load(file=write(b"seed: 4\n" + b"#" * (yaml.MAX_BYTES - 8))).seed == 4


def test_encodings(write):
    assert "byte 0xe9 at offset 11" in refusal(file=write("seed: 1 # é".encode("latin-1").replace(b"# ", b"#  ")))
    assert "offset 0" in refusal(file=write("seed: 1".encode("utf-16")))
    assert load(file=write(b"\xef\xbb\xbfseed: 3\r\npretrain:\r\n  epochs: 4\r\n")).seed == 3


def test_unreadable_files(tmp_path):
    assert "No such file" in refusal(file=tmp_path / "none.yaml")
    assert "cannot be read" in refusal(file=tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E3", 1000.0), (".5", 0.5), ("-2.", -2.0), ("010", 10), ("64_000", 64000), ("+3", 3),
        ("yes", "yes"), ("off", "off"), ("2024-01-01", "2024-01-01"), ("12:30", "12:30"), ("0x10", "0x10"),
        ("class:3", "class:3"), ("true", True), ("False", False), ("~", None), ("null", None), ("nan", "nan"),
        ("-_", "-_"), ("._", "._"), ("0b1", "0b1"), ("1:30", "1:30"), ("=", "="),
        ("'1'", "1"), ("[1, a]", [1, "a"]), ("{a: 1e-3}", {"a": 1e-3}),
    ],
)  # fmt: skip
def test_scalars_mean_one_thing(text, value):
    for found in (yaml.parse_scalar(text, "x"), yaml.parse_yaml(f"a: {text}", "x")["a"]):
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value",
    ["1e-3", "yes", "no", "010", "12:30", "2024-01-01", "null", "~", "", "a: b", "# a", " a ", "-", "=", "<<", "'", "\\",  # noqa: E501
     "a\nb", "é", "true", "1_0", "!x", "&x", "*x", "[", 1e-5, 1e22, 0.1, -3, None, True, [], {}, {"1": [None]},
     "\x85", "a\u2028b"],
)  # fmt: skip
def test_what_is_dumped_reads_back(value):
    text = yaml.dump_yaml({"a": value})
    found = yaml.parse_yaml(text, "x")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["yes", "off", "010", "0x1F", "1:30", "2024-01-01", "1e-3", ".inf", "=", "<<"])
def test_what_another_reader_would_take_for_something_else_is_quoted(text):
    assert yaml.dump_yaml([text]) in (f"- '{text}'\n", f'- "{text}"\n')
    assert yaml.dump_yaml(["class"]) == "- class\n"


def test_bytes_that_are_no_text_are_refused():
    assert "not valid Unicode" in refusal("data.root=/data/\udc80")
    assert "not valid Unicode" in refusal('encoder.args={"a": "\\ud800"}')
