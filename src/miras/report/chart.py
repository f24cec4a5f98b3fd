"""Line charts: their curves, and the table of values that a page draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from miras.report.text import raw

MAX_POINTS = 80
_THIN_ABOVE = 100
_SLOTS = {"memory": 0, "twin": 1}
_COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """One line: `x`, `y` (n,), with `low`, `high` and `counts` (n,) or empty; NaN in `y` leaves a
    gap.

    `role` "memory" or "twin" gives the line the colour of that model.
    """

    name: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    role: str = ""

    def __post_init__(self) -> None:
        n = len(self.x)
        if len(self.y) != n:
            raise ValueError(f"curve {self.name!r}: {n} x values but {len(self.y)} y values")
        for label in ("low", "high", "counts"):
            if len(getattr(self, label)) not in (0, n):
                raise ValueError(f"curve {self.name!r}: {label} must be empty or hold {n} values")
        if bool(self.low) != bool(self.high):
            raise ValueError(f"curve {self.name!r}: give both low and high, or neither")

    def cell(self, index: int) -> str:
        """One value with its interval and number of trials, in the format of the page's script."""
        if not math.isfinite(self.y[index]):
            return "not measured"
        extra: list[str] = []
        if self.low and math.isfinite(self.low[index]) and math.isfinite(self.high[index]):
            extra.append(f"{raw(self.low[index])} to {raw(self.high[index])}")
        if self.counts:
            extra.append(f"n = {self.counts[index]}")
        return raw(self.y[index]) + (f" ({', '.join(extra)})" if extra else "")


@dataclass(frozen=True)
class Chart:
    """Curves over a linear or log x axis; `floor` and `ceiling` fix the ends of the y axis.

    `reference` is a value of y, drawn as a line, with its label.
    """

    ident: str
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    height: int = 300
    log_x: bool = False
    floor: float | None = None
    ceiling: float | None = None
    reference: tuple[float, str] | None = None

    @property
    def measured(self) -> bool:
        """Whether there is a value to draw."""
        return any(math.isfinite(y) for curve in self.curves for y in curve.y)

    @property
    def slots(self) -> list[int]:
        """The index of each curve's colour, dash and marker: memory 0, twin 1, others the next
        free."""
        owners: dict[int, int] = {}
        for role, slot in _SLOTS.items():
            owners |= {next((i for i, c in enumerate(self.curves) if c.role == role), -1): slot}
        owners.pop(-1, None)
        free = iter(range(2 if owners else 0, 2 + len(self.curves)))
        return [owners[i] if i in owners else next(free) % _COLOURS for i in range(len(self.curves))]

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """The table: one row per x with a cell per curve, empty if the curve has no point there."""
        found: dict[float, list[str]] = {}
        for column, curve in enumerate(self.curves):
            for index in thinned(curve):
                found.setdefault(curve.x[index], [""] * len(self.curves))[column] = curve.cell(index)
        return [(raw(x), found[x]) for x in sorted(found)]

    @property
    def notes(self) -> list[str]:
        """A sentence on how many points are drawn if curves are thinned."""
        longest = max(self.curves, key=lambda curve: len(curve.x))
        drawn = len(thinned(longest))
        return (
            [f"{drawn:,} of {len(longest.x):,} points are drawn for each line."]
            if drawn < len(longest.x)
            else []
        )


def thinned(curve: Curve) -> list[int]:
    """About MAX_POINTS points of a curve, evenly spaced, with the first, last, lowest and
    highest."""
    n = len(curve.x)
    if n <= _THIN_ABOVE:
        return list(range(n))
    known = [i for i in range(n) if math.isfinite(curve.y[i])]
    ends = {f(known, key=curve.y.__getitem__) for f in (min, max)} if known else set[int]()
    return sorted(ends | {round(i * (n - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})
