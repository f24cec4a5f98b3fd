"""Choices are frozen dataclasses that hold what their fields are declared to hold."""

import dataclasses
import math
import types
import typing
from functools import lru_cache
from numbers import Integral, Real
from typing import Any


class Typed:
    """A dataclass whose fields of the types below hold just that, and no number in them is NaN or infinite.

    Raises ValueError for the first that does not; a subclass with a `__post_init__` of its own calls this one first.
    """

    def __post_init__(self) -> None:
        for name, kinds in _declared(type(self)).items():
            value = getattr(self, name)
            if not any(_holds(kind, value) for kind in kinds):
                wanted = " or ".join(_WORDS[kind] for kind in kinds)
                raise ValueError(f"{type(self).__name__}: {name} must be {wanted}, got {value!r}")


_WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a text",
    types.NoneType: "None",
}


def _holds(kind: type, value: Any) -> bool:
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool):  # an int to Python, and no number to a user
        return False
    return isinstance(value, Integral if kind is int else Real) and math.isfinite(typing.cast(Any, value))


@lru_cache(maxsize=256)
def _declared(cls: Any) -> dict[str, tuple[type, ...]]:
    """The fields that are declared as one or more of the types that are looked at."""
    hints = typing.get_type_hints(cls)
    found: dict[str, tuple[type, ...]] = {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if all(kind in _WORDS for kind in kinds):
            found[f.name] = kinds
    return found
