"""What a chart shows, and numbers as a page writes them."""

import math
from collections.abc import Callable

import pytest

from miras.report.chart import MAX_POINTS, Chart, Curve, thinned
from miras.report.text import duration, number


def chart_of(*curves: Curve) -> Chart:
    return Chart("chart", "The title", "x", "y", curves)


def test_thinning_keeps_true_points_and_the_extremes():
    ys = [math.sin(i / 50) for i in range(1000)]
    ys[333], ys[777] = 9.0, -9.0
    curve = Curve("c", [float(i) for i in range(1000)], ys, [y - 1 for y in ys], [y + 1 for y in ys])
    kept = thinned(curve)
    assert MAX_POINTS <= len(kept) <= MAX_POINTS + 2 and {0, 333, 777, 999} <= set(kept)
    rows = dict(chart_of(curve).rows)
    assert list(rows) == [str(i) for i in kept]
    assert rows["333"] == ["9 (8 to 10)"] and rows["777"] == ["-9 (-10 to -8)"]
    assert chart_of(curve).notes == [f"{len(kept)} of 1,000 points are drawn for each line."]


def test_the_table_has_a_cell_for_each_curve_and_says_what_is_missing():
    first = Curve("a", [1.0, 2.0], [0.5, math.nan], [0.25, math.nan], [0.75, math.nan], [10, 10])
    second = Curve("b", [2.0, 3.5], [1e-9, 4.0])
    rows = chart_of(first, second).rows
    assert rows == [
        ("1", ["0.5 (0.25 to 0.75, n = 10)", ""]),
        ("2", ["not measured", "1e-09"]),
        ("3.5", ["", "4"]),
    ]
    assert not chart_of(Curve("c", [1.0], [math.nan])).measured


def test_memory_and_twin_keep_their_colours():
    curves = [
        Curve(name, [], [], role=role)
        for name, role in (("a", ""), ("t", "twin"), ("b", ""), ("m", "memory"))
    ]
    assert chart_of(*curves).slots == [2, 1, 3, 0]
    assert chart_of(curves[0]).slots == [0]
    assert len(set(chart_of(*(Curve(str(i), [], [], role="memory") for i in range(5))).slots)) == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: Curve("c", [1.0], [1.0, 2.0]),
        lambda: Curve("c", [1.0], [1.0], low=[0.5]),
        lambda: Curve("c", [1.0], [1.0], counts=[1, 2]),
    ],
)
def test_lengths_that_do_not_fit_are_refused(make: Callable[[], object]):
    with pytest.raises(ValueError, match="curve 'c'"):
        make()


def test_numbers_are_written_plainly():
    found = [number(v) for v in (0, 1048576, 2.5, 1234.5678, 0.00123456, -3.0)]
    assert found == ["0", "1,048,576", "2.5", "1,235", "0.001235", "-3"]
    assert number(3.2e-7, 2) == "3.2 × 10⁻⁷" and number(math.nan) == "not measured"
    found = [duration(s) for s in (0.1234, 59.96, 125, 7321)]
    assert found == ["0.123\u00a0s", "60\u00a0s", "2\u00a0min 5\u00a0s", "2\u00a0h 2\u00a0min"]
