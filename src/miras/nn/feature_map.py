"""Feature maps of queries and keys, applied last before the memory; they may change the width."""

import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from miras.core.typed import Typed
from miras.nn.gates import Precise, precise
from miras.nn.norm import unit


class FeatureMap(Typed, ABC):
    """phi(q) and phi(k), which the memory gets instead of q and k: a frozen dataclass that builds
    its module."""

    @abstractmethod
    def width(self, key_dim: int) -> int:
        """The width of phi(x) for x of width key_dim."""

    @abstractmethod
    def build(self, key_dim: int, num_heads: int) -> nn.Module:
        """The module, with fresh parameters: (B, H, ..., key_dim) to (B, H, ..., width)."""


@dataclass(frozen=True)
class Identity(FeatureMap):
    """phi(x) = x: no feature map."""

    def width(self, key_dim: int) -> int:
        return key_dim

    def build(self, key_dim: int, num_heads: int) -> nn.Module:
        return nn.Identity()


@dataclass(frozen=True)
class Polynomial(FeatureMap):
    """Every monomial of x up to a degree (ATLAS, arXiv 2505.23735, 3.1): a linear memory holds
    O(Dk^degree) pairs.

        phi(x) . phi(y) = sum_i c_i^2 (x . y)^i / sum_i c_i^2,   i = 0, ..., degree

    c_i, one per head, is learned and initially 1 / i!. Each monomial occurs once, (Dk + degree
    choose degree) in all. Unit length is preserved, as step sizes and their bound expect. Raises
    ValueError for a degree below 1.
    """

    degree: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degree < 1:
            raise ValueError(f"Polynomial: degree must be at least 1, got {self.degree}")

    def width(self, key_dim: int) -> int:
        return math.comb(key_dim + self.degree, self.degree)

    def build(self, key_dim: int, num_heads: int) -> nn.Module:
        return Monomials(key_dim, self.degree, num_heads)


class Monomials(Precise):
    """x (B, H, ..., D) to its monomials, by degree, weighted as `Polynomial` says."""

    def __init__(self, width: int, degree: int, num_heads: int) -> None:
        super().__init__()
        self.sizes = width, degree
        first = torch.tensor([1 / math.factorial(i) for i in range(degree + 1)], dtype=precise())
        self.c = nn.Parameter(first.repeat(num_heads, 1))
        for name, table in _tables(width, degree).items():
            self.register_buffer(name, table, persistent=False)

    def reset_fixed(self) -> None:
        for name, table in _tables(*self.sizes).items():
            getattr(self, name).copy_(table)

    def extra_repr(self) -> str:
        return "width {}, degree {}".format(*self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.ones_like(x[..., :1]), x]
        for i in range(2, self.sizes[1] + 1):
            products = parts[-1][..., None] * x[..., None, :]
            parts.append(products.flatten(-2).index_select(-1, self.get_buffer(f"kept{i}")))
        orders = self.get_buffer("orders").to(x.dtype)
        scale = unit(self.c).index_select(1, self.get_buffer("degree")) * orders.sqrt()
        return torch.cat(parts, -1) * scale.view(len(scale), *[1] * (x.dim() - 3), -1)


def _tables(width: int, degree: int) -> dict[str, Tensor]:
    """Index and weight tables of monomials, ordered by degree and then by their channels.

    degree (n,); orders (n,), the number of orders in which its channels can be multiplied; kept2,
    ...: the positions of each degree's monomials among the products of the previous degree's with
    every channel.
    """
    channels = [list(itertools.combinations_with_replacement(range(width), i)) for i in range(degree + 1)]
    every = [each for part in channels for each in part]
    found = {"degree": torch.tensor([len(each) for each in every])}
    found["orders"] = torch.tensor([_orders(each) for each in every])
    for i in range(2, degree + 1):
        kept = [n * width + j for n, each in enumerate(channels[i - 1]) for j in range(each[-1], width)]
        found[f"kept{i}"] = torch.tensor(kept)
    return found


def _orders(channels: tuple[int, ...]) -> int:
    return math.factorial(len(channels)) // math.prod(map(math.factorial, Counter(channels).values()))


FEATURE_MAPS = (Identity, Polynomial)
