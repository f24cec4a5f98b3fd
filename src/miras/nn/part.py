"""The parts of a model as frozen configs: sizes that its layers share, a mixer, an MLP. Each builds
its module."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from miras.core.typed import Typed
from miras.nn.mixer import Mixer

LARGEST = 2**31 - 1
"""Upper limit of any size: tensors have products of a few of them."""


def check_sizes(part: Any, **least: float) -> None:
    """Raise ValueError for a field below its minimum or above the limit of sizes; None is not
    checked."""
    for name, low in least.items():
        value = getattr(part, name)
        if value is not None and not low <= value <= LARGEST:
            wanted = f"least {low}" if value < low else f"most {LARGEST}"
            raise ValueError(f"{type(part).__name__}: {name} must be at {wanted}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Sizes(Typed):
    """Sizes that the layers of a model share.

    head_dim: the width of a head, hidden_size / num_heads by default; intermediate_size: the width
    inside an MLP, by default 8/3 hidden_size rounded up to 16; rope_theta: the base of rotary
    positions; norm_eps: epsilon of all norms. Raises ValueError for sizes that do not fit.
    """

    hidden_size: int = 256
    num_heads: int = 4
    head_dim: int | None = None
    intermediate_size: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, hidden_size=1, num_heads=1, head_dim=1, intermediate_size=1, norm_eps=0)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"{type(self).__name__}: hidden_size {self.hidden_size} is not a multiple of num_heads "
                f"{self.num_heads}; change one of them or give head_dim"
            )
        if self.rope_theta <= 0:
            raise ValueError(f"{type(self).__name__}: rope_theta must be above 0, got {self.rope_theta}")

    def width(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Typed, ABC):
    """A token mixer's config as a frozen dataclass: it builds the module, and states its properties
    without it.

    A subclass is defined beside its module. A field may hold another mixer's config, or a tuple of
    them; their properties then apply unless it overrides them. A field name means the same in all
    mixers: `miras.preset` changes it in all of them.
    """

    name: ClassVar[str]
    """Its name in files and on the command line."""

    @abstractmethod
    def build(self, sizes: Sizes) -> Mixer:
        """The module, with fresh parameters."""

    @abstractmethod
    def flops(self, sizes: Sizes) -> int:
        """FLOPs of one token's forward pass, 2 per multiply-add of matrices."""

    def stride(self) -> int:
        """Number of tokens after which no chunk or segment is open."""
        return math.lcm(*(part.stride() for part in self.parts()))

    def grows(self) -> bool:
        """Whether a stream's state grows with every token."""
        return any(part.grows() for part in self.parts())

    def refusal(self, sizes: Sizes) -> str | None:
        """Why it is not supported with these sizes, or None."""
        return next((reason for part in self.parts() if (reason := part.refusal(sizes))), None)

    def words(self) -> list[str]:
        """What `miras info` says about it in addition to its memories."""
        return [line for part in self.parts() for line in part.words()]

    def sees(self) -> dict[str, Any]:
        """The fields of an attention that sees as much, for the attention-only model; empty without
        attention."""
        return next((fields for part in self.parts() if (fields := part.sees())), {})

    def parts(self) -> list["MixerConfig"]:
        """The configs that its fields hold."""
        return [part for value in vars(self).values() for part in _held(value)]

    def walk(self) -> Iterator["MixerConfig"]:
        """Itself and all its parts, recursively."""
        yield self
        for part in self.parts():
            yield from part.walk()

    def names(self) -> set[str]:
        """The field names that `changed` accepts."""
        own = {name for name, value in vars(self).items() if not _held(value)}
        return own.union(*(part.names() for part in self.parts()))

    def changed(self, values: Mapping[str, Any], like: Sequence["MixerConfig"] = ()) -> Self:
        """The same with fields replaced by `values`, here and in its parts.

        Other fields are as in the first of `like` that has them.
        """
        new: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, MixerConfig):
                there = next((part for part in like if type(part) is type(value)), value)
                new[name] = there.changed(values, like)
            elif parts := _held(value):
                new[name] = tuple(part.changed(values) for part in parts)
            else:
                known = next((vars(part)[name] for part in like if name in vars(part)), value)
                new[name] = values.get(name, known)
        return dataclasses.replace(self, **new)


def _held(value: Any) -> tuple[MixerConfig, ...]:
    """The configs in a field's value: one, or a tuple of them."""
    values: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    return values if all(isinstance(part, MixerConfig) for part in values) else ()


class MLPConfig(Typed, ABC):
    """The config of an MLP after a mixer, as a frozen dataclass: x (..., hidden) to the same."""

    name: ClassVar[str]
    """Its name in files."""

    @abstractmethod
    def build(self, sizes: Sizes) -> nn.Module:
        """The module, with fresh parameters; its last linear map is called `down`."""

    @abstractmethod
    def width(self, sizes: Sizes) -> int:
        """Its inner width."""

    @abstractmethod
    def flops(self, sizes: Sizes) -> int:
        """FLOPs of one token's forward pass."""


def kind_name(kind: type) -> str:
    """The name of a class in files: its `name`, or the class name."""
    return getattr(kind, "name", kind.__name__)
