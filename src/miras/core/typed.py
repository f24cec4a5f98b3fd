"""Choices are frozen dataclasses whose fields have the declared types."""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterable
from functools import lru_cache
from numbers import Integral, Real
from typing import Any


class Typed:
    """A dataclass that checks its fields of the types below; numbers must be finite.

    Raises ValueError for the first wrong field. A subclass with its own `__post_init__` calls this
    one first.
    """

    def __post_init__(self) -> None:
        for name, kinds in _declared(type(self)).items():
            value = getattr(self, name)
            if not any(_holds(kind, value) for kind in kinds):
                wanted = " or ".join(_WORDS[kind] for kind in kinds)
                raise ValueError(f"{type(self).__name__}: {name} must be {wanted}, got {value!r}")
            # of numpy: JSON has none
            if isinstance(value, Real) and not isinstance(value, int | float):
                plain = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, name, plain)


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
    if isinstance(value, bool):  # an int to Python, but not a number to a user
        return False
    if isinstance(value, Integral):
        return True
    return kind is float and isinstance(value, Real) and math.isfinite(value)


@lru_cache(maxsize=256)
def _declared(cls: Any) -> dict[str, tuple[type, ...]]:
    """The fields whose declared types are checked."""
    found: dict[str, tuple[type, ...]] = {}
    for f in dataclasses.fields(cls):
        hint = f.type if not isinstance(f.type, str) else _resolved(cls, f.name, f.type)
        origin = typing.get_origin(hint)
        # list[int] and the like
        holder = isinstance(origin, type) and origin is not types.UnionType
        kinds = (hint,) if holder else typing.get_args(hint) or (hint,)
        if all(kind in _WORDS for kind in kinds):
            found[f.name] = kinds
    return found


def _resolved(cls: Any, name: str, hint: str) -> Any:
    """The type that a string annotation names, or None if only a type checker could tell."""
    home = next(c for c in cls.__mro__ if name in vars(c).get("__annotations__", {}))
    try:
        return eval(hint, dict(vars(sys.modules[home.__module__])))
    except NameError:
        return None


def overridden(choice: Any, base: type, names: Iterable[str]) -> frozenset[str]:
    """Which of these methods a choice overrides."""
    return frozenset(name for name in names if getattr(type(choice), name) is not getattr(base, name))
