"""Axis 1, memory structure: where the linear maps are. A memory neither holds nor sees its
weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.activation import gelu, layer_norm
from miras.core.typed import Typed


@dataclass(frozen=True)
class Weights:
    """The operations with weights that a memory uses, independent of how the weights are stored.

    linear(name, x): x @ W[name], (..., d_in) -> (..., d_out). scale(name, x): x * w, elementwise,
    for a weight of shape (d, 1). outer[name]: a parameter that only the outer loop learns, (...,
    width), broadcast over tokens.
    """

    linear: Callable[[str, Tensor], Tensor]
    scale: Callable[[str, Tensor], Tensor]
    outer: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class Memory(Typed, ABC):
    """A map from keys (..., d_key) to values (..., d_value) whose weights are learned while
    reading.

    Weights are named matrices (d_in, d_out). The input of the first is the key and the output of
    the last is the value; a memory with other widths overrides `widths`.
    """

    elementwise: ClassVar[bool] = False
    """Whether weights are vectors, shape (d, 1), that scale elementwise."""

    @abstractmethod
    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        """Name and shape (d_in, d_out) of every weight."""

    @abstractmethod
    def apply(self, x: Tensor, w: Weights) -> Tensor:
        """The memory's output at x (..., d_key), as (..., d_value)."""

    def outer(self, d_key: int, d_value: int) -> dict[str, tuple[int, float]]:
        """Width and initial value of every parameter that only the outer loop learns."""
        return {}

    def widths(self, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        """Key and value width of a memory with these weights."""
        return next(iter(shapes.values()))[0], list(shapes.values())[-1][1]

    @property
    def form(self) -> frozenset[str]:
        """What a path that runs it must support: "scale", "scale and linear", "weight used
        again"."""
        try:
            return _known_form(self)
        except TypeError:  # not hashable
            return _form(self)

    def refusal(self, rule: Any) -> str | None:
        """Why this memory is not supported in a rule, or None."""
        return None


def _form(memory: Memory) -> frozenset[str]:
    """Found by applying it once."""
    width = 4
    try:
        shapes = memory.shapes(width, width)
    except ValueError:
        return frozenset({f"widths other than {width}"})
    used: list[str] = []
    kinds: set[str] = set()

    def linear(name: str, x: Tensor) -> Tensor:
        used.append(name)
        kinds.add("linear")
        return x.new_zeros(*x.shape[:-1], shapes[name][1])

    def scale(name: str, x: Tensor) -> Tensor:
        used.append(name)
        kinds.add("scale")
        return x

    x = torch.zeros(1, 1, 1, width, device="cpu")
    outer = {n: x.new_zeros(1, 1, wide) for n, (wide, _) in memory.outer(width, width).items()}
    with torch.no_grad():
        memory.apply(x, Weights(linear, scale, outer))
    both = {"scale and linear"} if len(kinds) > 1 else kinds - {"linear"}
    return frozenset(both | ({"weight used again"} if len(set(used)) < len(used) else set()))


_known_form = lru_cache(maxsize=256)(_form)


@dataclass(frozen=True)
class Vector(Memory):
    """An elementwise memory, M(x) = x * w (MIRAS 4.4 "vector"): one weight for each channel,
    d_key = d_value."""

    elementwise: ClassVar[bool] = True

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        _equal_widths("Vector", "scales its input", d_key, d_value)
        return {"w": (d_key, 1)}

    def widths(self, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        return shapes["w"][0], shapes["w"][0]

    def apply(self, x: Tensor, w: Weights) -> Tensor:
        return w.scale("w", x)


@dataclass(frozen=True)
class Matrix(Memory):
    """A linear memory, M(x) = x W. Titans' L_M = 1; the fast weights of linear attention and
    DeltaNet."""

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        return {"w": (d_key, d_value)}

    def apply(self, x: Tensor, w: Weights) -> Tensor:
        return w.linear("w", x)


@dataclass(frozen=True)
class MLP(Memory):
    """A deep memory, M(x) = x + LN(gelu(... gelu(x W_1) ...) W_depth) (Titans, NeurIPS version;
    MIRAS 5.3).

    `depth` counts weight matrices; the hidden width is `expansion` times the key width. `bias` adds
    a learned vector b_i after each W_i, `affine` a gain and a shift of the norm that only the outer
    loop learns (both as in TTT). `bias_input` is the factor of each b_i: 1, or for "key"
    d_key^-1/2, the size of an entry of a unit key; the biases then learn at lr / d_key, as in TTT's
    code. `residual` needs equal key and value widths. Without `norm` nothing bounds the inner
    gradient: such a memory of depth 2 or more diverges on random input unless its steps are small.
    """

    depth: int = 2
    expansion: int = 4
    residual: bool = True
    norm: bool = True
    bias: bool = False
    affine: bool = False
    bias_input: Literal["one", "key"] = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1 or self.expansion < 1:
            raise ValueError(
                f"MLP: depth and expansion must be at least 1, got depth={self.depth}, expansion={self.expansion}"
            )
        if self.bias_input not in ("one", "key"):
            raise ValueError(f"MLP: bias_input must be 'one' or 'key', got {self.bias_input!r}")
        if self.affine and not self.norm:
            raise ValueError("MLP: affine=True adds a gain and a shift to the norm, which norm=False removes")

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        if self.residual:
            _equal_widths("MLP", "adds its input to its output", d_key, d_value)
        widths = [d_key, *[self.expansion * d_key] * (self.depth - 1), d_value]
        shapes: dict[str, tuple[int, int]] = {}
        for i in range(self.depth):
            shapes[f"w{i + 1}"] = widths[i], widths[i + 1]
            if self.bias:
                shapes[f"b{i + 1}"] = 1, widths[i + 1]
        return shapes

    def outer(self, d_key: int, d_value: int) -> dict[str, tuple[int, float]]:
        return {"gain": (d_value, 1.0), "shift": (d_value, 0.0)} if self.affine else {}

    def constant(self, d_key: int) -> float:
        """The factor of each bias."""
        return d_key**-0.5 if self.bias_input == "key" else 1.0

    def apply(self, x: Tensor, w: Weights) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = w.linear(f"w{i}", gelu(y) if i > 1 else y)
            if self.bias:
                y = y + w.linear(f"b{i}", x.new_full((*x.shape[:-1], 1), self.constant(x.shape[-1])))
        return _finish(self.residual, self.norm, x, y, w)


@dataclass(frozen=True)
class GatedMLP(Memory):
    """A gated deep memory, M(x) = x + LN((silu(x W_1) * (x W_3)) W_2) (LaCT; ATLAS "gated MLP").

    The hidden width is `expansion` times the key width. `residual` and `norm` as in `MLP`.
    """

    expansion: int = 4
    residual: bool = True
    norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expansion < 1:
            raise ValueError(f"GatedMLP: expansion must be at least 1, got {self.expansion}")

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        if self.residual:
            _equal_widths("GatedMLP", "adds its input to its output", d_key, d_value)
        hidden = self.expansion * d_key
        return {"w1": (d_key, hidden), "w3": (d_key, hidden), "w2": (hidden, d_value)}

    def apply(self, x: Tensor, w: Weights) -> Tensor:
        y = w.linear("w2", F.silu(w.linear("w1", x)) * w.linear("w3", x))
        return _finish(self.residual, self.norm, x, y, w)


def _finish(residual: bool, norm: bool, x: Tensor, y: Tensor, w: Weights) -> Tensor:
    if norm:
        y = layer_norm(y)
    if "gain" in w.outer:
        y = y * w.outer["gain"] + w.outer["shift"]
    return x + y if residual else y


def _equal_widths(name: str, why: str, d_key: int, d_value: int) -> None:
    if d_key != d_value:
        raise ValueError(
            f"{name}: a memory that {why} needs equal key and value widths, got {d_key} and {d_value}. "
            f"Use equal widths" + ("" if name == "Vector" else f" or {name}(residual=False)")
        )


MEMORIES = (Matrix, MLP, GatedMLP, Vector)
