"""Problems, and the measure of agreement, for the tests against other people's code."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

Tree = dict[str, Tensor]
ROWS = pytest.StashKey[list[tuple[str, str, float]]]()


class Draw:
    """Random leaves that are the same in fp32 and fp64: B rows, H heads, T tokens, widths DK and DV."""

    B, H, T, DK, DV = 2, 3, 70, 8, 6

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.leaves: list[Tensor] = []

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self._leaf(scale * torch.randn(*shape, generator=self.generator))

    def tokens(self, *tail: int) -> Tensor:
        return self.normal(self.B, self.H, self.T, *tail)

    def keys(self, *tail: int) -> Tensor:
        return self._leaf(
            torch.nn.functional.normalize(
                torch.randn(self.B, self.H, self.T, *tail, generator=self.generator), dim=-1
            )
        )

    def gate(self, *tail: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Values (B, H, T, ...tail) between low and high, neither included: the references take logarithms."""
        x = torch.rand(self.B, self.H, self.T, *tail, generator=self.generator)
        return self._leaf(low + (high - low) * (0.02 + 0.96 * x))

    def _leaf(self, x: Tensor) -> Tensor:
        self.leaves.append(x.double().requires_grad_())
        return self.leaves[-1]


class Agreement:
    """Asserts that numbers agree, and keeps the largest difference for the table at the end of a verbose run."""

    def __init__(self, rows: list[tuple[str, str, float]]) -> None:
        self.rows = rows

    def __call__(self, what: str, reference: str, ours: Tree, theirs: Tree, tolerance: float) -> None:
        """Each tensor within `tolerance`, relative to the largest entry of the reference's."""
        assert ours.keys() == theirs.keys()
        largest = max(difference(ours[name], theirs[name]) for name in ours)
        self.rows.append((what, reference, largest))
        assert largest <= tolerance, {name: difference(ours[name], theirs[name]) for name in ours}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference relative to the largest entry of the reference's; inf where not finite."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    ours, theirs = ours.detach(), theirs.detach().double()
    found = float((ours - theirs).abs().max() / theirs.abs().max())
    return found if found == found else float("inf")


@pytest.fixture
def draw() -> Draw:
    return Draw()


@pytest.fixture
def agree(request: pytest.FixtureRequest) -> Iterator[Agreement]:
    yield Agreement(request.config.stash.setdefault(ROWS, []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With -v, the table of docs/design-space.md."""
    rows = config.stash.get(ROWS, [])
    if rows and config.get_verbosity() > 0:
        terminalreporter.section("largest differences")
        for what, reference, largest in rows:
            terminalreporter.line(f"| {what} | {reference} | {largest:.0e} |")
