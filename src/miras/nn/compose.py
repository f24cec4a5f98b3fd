"""Settings of a memory from strings, as given on the command line or in a config file."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from miras.nn.config import AXES, ModelConfig
from miras.nn.feature_map import FeatureMap
from miras.nn.gates import Gate
from miras.nn.memory import MemoryConfig
from miras.nn.plain import KINDS, function, hints_of, named
from miras.store.words import folded, kebab, nearest


def composed(config: ModelConfig, texts: Mapping[str, str], trusted: bool = False) -> dict[str, Any]:
    """Overrides for `miras.zoo.override` from {"memory": "mlp", "memory.depth": "3",
    "gates.lr.bias": "-1.5"}.

    Everything else is as in the config's first memory; a choice of another class starts from its
    defaults. `trusted` allows importing and running choices named by import path. Raises ValueError
    for unknown names.
    """
    memory = next(iter(config.memories()), MemoryConfig())
    found: dict[str, Any] = {}
    for axis, base in (AXES | {"feature_map": FeatureMap}).items():
        fields = _under(texts, axis)
        if axis not in texts and not fields:
            continue
        old = getattr(memory.rule if axis in AXES else memory, axis)
        flag = axis.replace("_", "-")
        kind = _kind(flag, base, texts[axis], trusted) if axis in texts else type(old)
        found[axis] = _made(flag, kind, old if type(old) is kind else None, fields, trusted)
    if fields := _under(texts, "features"):
        found["features"] = _made("features", type(memory.features), memory.features, fields, trusted)
    made, gates = memory.made(), dict[str, dict[str, str]]()
    for key, text in _under(texts, "gates").items():
        name, _, field = key.rpartition(".")
        gates.setdefault(name, {})[field] = text
    for name, fields in gates.items():
        old = made.get(name, made.get(name.partition(".")[0], Gate()))
        found.setdefault("gates", {})[name] = _made(f"gates.{name}", Gate, old, fields, trusted)
    return found


def _under(texts: Mapping[str, str], head: str) -> dict[str, str]:
    return {
        name.removeprefix(f"{head}."): text for name, text in texts.items() if name.startswith(f"{head}.")
    }


def _kind(axis: str, base: type, name: str, trusted: bool) -> type:
    """The class that a string names, ignoring case and hyphens, or by its import path."""
    known = {folded(each): kind for each, kind in KINDS[base].items()}
    if folded(name) in known:
        return known[folded(name)]
    if ":" in name:
        return named(base, name, trusted, axis)
    words = [kebab(each) for each in KINDS[base]]
    raise ValueError(
        f"--{axis}: unknown {axis} {name!r}{nearest(name, words)}; known are {', '.join(words)}, or name a class of "
        f"your own by its import path, package.module:Class"
    )


def _made(flag: str, kind: Any, old: Any, texts: Mapping[str, str], trusted: bool) -> Any:
    """A choice with fields from strings; the others are those of `old` or their defaults."""
    hints = hints_of(kind)
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in hints:
            has = f"; it has {', '.join(hints)}" if hints else ", nor any other field"
            raise ValueError(f"--{flag}.{name}: {kind.__name__} has no {name!r}{nearest(name, hints)}{has}")
        values[name] = _value(f"--{flag}.{name}", hints[name], text, trusted)
    if old is not None:
        return dataclasses.replace(old, **values)
    needed = [
        f.name
        for f in dataclasses.fields(kind)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(
            f"--{flag}: {kind.__name__} needs {' and '.join(missing)}; add --{flag}.{missing[0]} VALUE"
        )
    return kind(**values)


_KINDS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", int),
    float: ("a number", float),
    bool: ("true or false", lambda text: {"true": True, "false": False}[text.lower()]),
}


def _value(flag: str, kind: Any, text: str, trusted: bool) -> Any:
    """A string as its field's type."""
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
    flag = flag.replace("_", "-")
    if kind in _KINDS:
        wanted, read = _KINDS[kind]
        try:
            return read(text)
        except (ValueError, KeyError):
            raise ValueError(f"{flag} must be {wanted}, got {text!r}") from None
    if typing.get_origin(kind) is typing.Literal and text not in (allowed := typing.get_args(kind)):
        raise ValueError(f"{flag} must be one of {', '.join(allowed)}, got {text!r}")
    return function(text, trusted) if ":" in text else text
