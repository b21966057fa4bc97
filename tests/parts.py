"""Every built-in method, objective and evaluator, and settings made of the values that a part has."""

from __future__ import annotations

from typing import Any

from distunlearn.config.registry import EVALUATOR, METHOD, OBJECTIVE, find, fitting, names, settings_of
from distunlearn.verify.figures import JUDGED

METHODS = {name: find(METHOD, name) for name in names(METHOD)}
OBJECTIVES = {name: find(OBJECTIVE, name) for name in names(OBJECTIVE)}
EVALUATORS = {name: find(EVALUATOR, name) for name in names(EVALUATOR)}
TRAINED = [name for name, method in METHODS.items() if method.steps != "none"]
ATTACKS = list(JUDGED)


def objective_settings(name: str = "simclr", **values: Any) -> Any:
    return fitting(OBJECTIVE, name, **values)


def method_settings(name: str = "third_party", **values: Any) -> Any:
    """Exactly these values: one that the method lacks is a TypeError."""
    return settings_of(METHOD, name, **values)


def constraint_settings(evaluator: str = "head", **values: Any) -> Any:
    return fitting(EVALUATOR, evaluator, **values)
