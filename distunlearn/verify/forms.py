"""What statements are made of: fields of one strict form each, and a reader that says which one is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import EvidenceError
from .figures import Rules

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=-1, le=1)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:+ -]{1,80}$")]
Text = Annotated[str, Field(pattern=r"^[ -~]{1,200}$")]


class Form(BaseModel):
    """No other fields, no other types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


F = TypeVar("F", bound=Form)


def read_form(form: type[F], content: Any, what: str) -> F:
    """Plain data as a form. what: as in "the certificate".

    Raises:
        EvidenceError: it has not this form.
    """
    try:
        return form.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise EvidenceError(f"{what} has {where!r} in another form ({first['msg']}); it is none.") from None


class RulesPart(Form):
    """`figures.Rules`."""

    seed: Count
    bootstrap: Count
    confidence: Number
    view_agreement: Number
    attack: Number
    utility_points: Number
    gates: list[Word]
    method: Word
    tier: Count
    references: Count

    def rules(self) -> Rules:
        """The same for `judge`."""
        return Rules(**{**self.model_dump(), "gates": tuple(self.gates)})


def rules_part(rules: Rules) -> dict[str, Any]:
    """The same as plain data."""
    return {**vars(rules), "gates": list(rules.gates)}


class Tree(Form):
    """A tree of RFC 9162 with one leaf for each image of the request."""

    size: Count
    root: Digest


def same(what: str, found: Mapping[str, Any], expected: Mapping[str, Any], sentence: str) -> None:
    """EvidenceError that names the first key under which two mappings differ. sentence: what it can mean."""
    for key in expected:
        if found.get(key) != expected[key]:
            raise EvidenceError(f"{key} of {what} is {_short(found.get(key))}, not {_short(expected[key])}; {sentence}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
