"""The packages that every installation brings along are each used by runs, for what they are for."""

from __future__ import annotations

import ast
import configparser
from pathlib import Path

import pytest
from test_layers import PACKAGE, imports, modules

# Package -> the name it is imported by, and the module through which runs use it.
USED_BY = {
    "torch": ("torch", "engine.loop"),  # training
    "torchvision": ("torchvision", "data.sources.decode"),  # images
    "deepspeed": ("deepspeed", "engine.backends.zero"),  # sharded training
    "accelerate": ("accelerate", "engine.backends.ddp"),  # distributed training
    "webdataset": ("webdataset", "data.prepare.write_shards"),  # shards
    "timm": ("timm", "encoders.backbone"),  # encoders
    "scikit-learn": ("sklearn", "audit.figures.utility"),  # the linear probe and kNN
}


def reached(start: str, texts: dict[str, str]) -> set[str]:
    """Modules that `start` imports, and those that these import, in functions too."""
    found, ahead = set(), [start]
    while ahead:
        name = ahead.pop()
        if name not in found and name in texts:
            found.add(name)
            ahead += [target for target, _ in imports(texts[name], texts)]
    return found


def imported(text: str) -> set[str]:
    """Top-level names of the packages that a module imports."""
    nodes = list(ast.walk(ast.parse(text)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", USED_BY)
def test_a_run_uses_it(package):
    texts, (name, module) = modules(PACKAGE), USED_BY[package]
    assert name in imported(texts[module])
    assert module in reached("run.pipeline", texts)
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[2] / "setup.cfg", encoding="utf-8")
    declared = [
        line.split(">")[0].split("=")[0].strip() for line in settings["options"]["install_requires"].split("\n")
    ]
    assert package in declared


def test_the_check_can_fail():
    texts = {"run.pipeline": "from distunlearn.a import b\n", "a": "import timm\n", "c": "import sklearn\n"}
    assert reached("run.pipeline", texts) == {"run.pipeline", "a"}
    assert imported(texts["c"]) == {"sklearn"}
