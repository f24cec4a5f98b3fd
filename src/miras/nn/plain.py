"""Frozen dataclasses as plain values for JSON: choices by name, those from outside by import
path."""

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from miras.core.algorithm import ALGORITHMS, Algorithm
from miras.core.bias import BIASES, Bias
from miras.core.memory import MEMORIES, Memory
from miras.core.retention import RETENTIONS, Retention
from miras.core.schedule import SCHEDULES, Schedule
from miras.nn.attention import AttentionConfig
from miras.nn.feature_map import FEATURE_MAPS, FeatureMap
from miras.nn.memory import MemoryConfig
from miras.nn.mlp import SwiGLUConfig
from miras.nn.part import MixerConfig, MLPConfig, kind_name
from miras.nn.sum import SumConfig
from miras.nn.titans import MACConfig, MAGConfig, MALConfig
from miras.store.words import nearest

KINDS: dict[type, dict[str, type]] = {
    base: {kind_name(kind): kind for kind in kinds}
    for base, kinds in (
        (Memory, MEMORIES),
        (Bias, BIASES),
        (Retention, RETENTIONS),
        (Algorithm, ALGORITHMS),
        (Schedule, SCHEDULES),
        (FeatureMap, FEATURE_MAPS),
        (MixerConfig, (AttentionConfig, MemoryConfig, MACConfig, MAGConfig, MALConfig, SumConfig)),
        (MLPConfig, (SwiGLUConfig,)),
    )
}
"""The library's choices of each kind, by their names in files."""


def written(value: Any) -> Any:
    """A value as plain JSON. Raises ValueError if that is impossible: not a dataclass, a function
    without a name."""
    if base := _base(type(value)):
        kind = type(value)
        if not dataclasses.is_dataclass(value):
            raise ValueError(
                f"ModelConfig: {_word(base)} {value!r} cannot be written: make {kind.__name__} a frozen dataclass"
            )
        name = kind_name(kind) if kind in KINDS[base].values() else _path(kind)
        return {"name": name, **fields(value)}
    if dataclasses.is_dataclass(value):
        return fields(value)
    if isinstance(value, Mapping):
        return {name: written(each) for name, each in typing.cast(Mapping[str, Any], value).items()}
    if isinstance(value, tuple | list):
        return [written(each) for each in typing.cast(list[Any], value)]
    return {"function": _path(value)} if callable(value) else value


def fields(part: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain JSON."""
    return {f.name: written(getattr(part, f.name)) for f in dataclasses.fields(part) if f.init}


def read(kind: Any, value: Any, trusted: bool, what: str = "") -> Any:
    """A value of that type from the output of `written`. Raises ValueError for unknown names and
    fields.

    `trusted` allows importing and running what it names by import path.
    """
    if isinstance(value, Mapping) and set(value) == {"function"}:
        return function(value["function"], trusted)
    if isinstance(kind, types.UnionType):
        held = [each for each in typing.get_args(kind) if each is not types.NoneType]
        return None if value is None or len(held) > 1 else read(held[0], value, trusted, what)
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(read(parts[0], each, trusted, what) for each in typing.cast(list[Any], value))
    if not isinstance(value, Mapping) or not (parts or isinstance(kind, type)):
        return value
    values = dict(typing.cast(Mapping[str, Any], value))
    if parts:
        return {name: read(parts[-1], each, trusted, name) for name, each in values.items()}
    if base := _base(kind):
        kind = named(base, values.pop("name", None), trusted, what)
    return made(kind, values, trusted) if dataclasses.is_dataclass(kind) else kind(**values)


def named(base: type, name: Any, trusted: bool, what: str = "") -> Any:
    """The class of a choice by name or import path. Raises ValueError if it is not such a
    choice."""
    known, what = KINDS[base], what or _word(base)
    if name in known:
        return known[name]
    if not isinstance(name, str) or ":" not in name:
        near = nearest(str(name), known)
        raise ValueError(f"ModelConfig: unknown {what} {name!r}{near}; known are {', '.join(known)}")
    kind = _imported(name, trusted)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"ModelConfig: {what} {name!r} is not a subclass of {base.__name__}")
    return kind


def made(kind: Any, values: Mapping[str, Any], trusted: bool) -> Any:
    """A dataclass from the output of `written`."""
    hints = hints_of(kind)
    if unknown := [name for name in values if name not in hints]:
        raise ValueError(
            f"{kind.__name__}: unknown fields {', '.join(unknown)}{nearest(unknown[0], hints)}; known are "
            f"{', '.join(hints)}"
        )
    return kind(**{name: read(hints[name], value, trusted, name) for name, value in values.items()})


def hints_of(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's init fields; Any if only a type checker could tell."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError:
        hints = {}
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(kind) if f.init}


def _base(kind: Any) -> Any:
    """The kind of choice that a class is, or None."""
    return next((base for base in KINDS if isinstance(kind, type) and issubclass(kind, base)), None)


def _word(base: type) -> str:
    return base.__name__.removesuffix("Config").lower()


TORCH: dict[str, Any] = {"torch": torch, "torch.nn.functional": F}
"""Modules whose functions are written by the name they have there."""

FUNCTIONS = frozenset(
    {
        *(f"torch:{n}" for n in ("exp", "exp2", "expm1", "sinh", "asinh", "atan", "erf")),
        *(f"torch:{n}" for n in ("celu", "relu", "selu", "sigmoid", "tanh")),
        *(f"torch.nn.functional:{n}" for n in ("celu", "elu", "gelu", "leaky_relu", "mish")),
        *(f"torch.nn.functional:{n}" for n in ("relu", "selu", "sigmoid", "silu", "softplus", "softsign")),
        *(f"torch.nn.functional:{n}" for n in ("hardsigmoid", "hardtanh", "tanh", "tanhshrink")),
    }
)
"""Functions that an untrusted config may name: elementwise functions of one tensor."""


def _path(thing: Any) -> str:
    """The import path "package.module:Name" of a class or function. Raises ValueError if it has
    none."""
    name = getattr(thing, "__qualname__", "")
    for module, home in TORCH.items():
        if name and getattr(home, thing.__name__, None) is thing:
            return f"{module}:{thing.__name__}"
    path = f"{getattr(thing, '__module__', None)}:{name}"
    try:
        found = _imported(path, True)
    except ValueError:
        found = None
    if found is not thing:
        raise ValueError(
            f"ModelConfig: {thing!r} cannot be written by its import path {path}: define it by name at the top level "
            f"of a module"
        )
    return path


def function(path: str, trusted: bool) -> Any:
    """The function that "module:name" names. Raises ValueError if it needs trust or does not
    exist."""
    if path in FUNCTIONS:
        module, _, name = path.partition(":")
        return getattr(TORCH[module], name)
    return _imported(path, trusted)


def _imported(path: str, trusted: bool) -> Any:
    """What an import path names. Raises ValueError if it is not allowed or does not exist."""
    if not trusted:
        raise ValueError(
            f"ModelConfig: this config names code to import and run, {path}, that is not part of miras; if you trust "
            f"it, read it with trust_remote_code=True (--trust-remote-code on the command line)"
        )
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        way = "install the package that has it, or put its module on the Python path"
        if module == "__main__":
            way = "it was defined in a script or a notebook: move it to a module, and make and save the model again"
        raise ValueError(f"ModelConfig: {path} cannot be imported ({error}); {way}") from error
    return found
