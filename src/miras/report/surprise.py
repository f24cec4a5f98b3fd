"""Act three: a page of text coloured by surprise, quantised to 24 levels and one byte a character."""

from __future__ import annotations

import base64
import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .model import SurpriseLayer, SurprisePage
from .palette import LEVELS
from .text import clusters, esc, number

MISSING = 255
_STEPS = 253
_EXPLAIN = {
    "momentary": "How strongly this one character pushes the memory to change: the size of the gradient of "
    "the memory’s own loss at that character. A memory does not predict characters: it is pushed wherever what it "
    "recalls for a key is not yet the value, also at what any reader expects.",
    "accumulated": "The running surprise the memory actually writes with: the push of this character plus "
    "what is left of the pushes before it, so it rises at an event and fades after it.",
    "predictive": "How many bits the model needed to name this character before it saw it: 0 bits is "
    "certain, 8 bits is a blind guess among 256 byte values.",
}


@dataclass(frozen=True)
class Scale:
    """A log scale from values to byte codes and to 24 colour levels, both rising with the value.

    Codes 1 to 254 span `floor` to `top`, code 0 is below `floor` and 255 is not measured; levels span the
    5 % to 99.5 % quantiles, `low` to `high`, at most two decades.
    """

    floor: float
    top: float
    low: float
    high: float

    @classmethod
    def fit(cls, values: Sequence[float]) -> Scale:
        """Choose the scale for values of shape (characters,)."""
        finite = sorted(v for v in values if math.isfinite(v))
        positive = [v for v in finite if v > 0]
        if not positive:
            return cls(1.0, 10.0, 1.0, 10.0)
        top = positive[-1]
        high = quantile(finite, 0.995) or top
        low = max(quantile(finite, 0.05), high / 100)
        if high <= low * 1.000001:
            low, high, top = low / 10, high * 10, max(top, high * 10)
        floor = min(low, max(positive[0], low / 10))
        return cls(floor, top, low, high)

    def code(self, value: float) -> int:
        """Return the byte code of a value."""
        if not math.isfinite(value):
            return MISSING
        if value < self.floor:
            return 0
        share = math.log(value / self.floor) / math.log(self.top / self.floor)
        return min(254, 1 + round(_STEPS * share))

    def decode(self, code: int) -> float:
        """Return the value that a code from 1 to 254 stands for."""
        return self.floor * (self.top / self.floor) ** ((code - 1) / _STEPS)

    def edge(self, level: int) -> float:
        """Return the value at the lower edge of a level from 0 to 24."""
        return self.low * (self.high / self.low) ** (level / len(LEVELS))

    def edges(self) -> list[int]:
        """Return the lowest code of each level from 1 to 23."""
        decoded = [self.decode(code) * (1 + 1e-9) for code in range(1, 255)]
        return [1 + bisect.bisect_left(decoded, self.edge(level)) for level in range(1, len(LEVELS))]


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile of sorted values, interpolated between neighbours."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def quantise(values: Sequence[float]) -> tuple[Scale, list[int], list[int]]:
    """Return the scale, the codes and the levels (-1 where not measured) of values of shape (characters,)."""
    scale = Scale.fit(values)
    edges = scale.edges()
    codes = [scale.code(v) for v in values]
    return scale, codes, [-1 if c == MISSING else bisect.bisect_right(edges, c) for c in codes]


def render_surprise(page: SurprisePage) -> str:
    """Return the coloured page with its legends, the sharpest moments of each kind and the plain text."""
    signs, columns = clusters(page.text, [layer.values for layer in page.layers])
    if not signs or not columns:
        return '<p class="absent">There was no text to colour in this run.</p>'
    quantised = [quantise(column) for column in columns]
    panels = "".join(
        _panel(index, layer, signs, columns[index], *quantised[index])
        for index, layer in enumerate(page.layers)
    )
    choices = "".join(
        f'<label><input type="radio" name="kind" value="{i}"{" checked" if i == 0 else ""}>'
        f"<span>{esc(layer.kind)}</span></label>"
        for i, layer in enumerate(page.layers)
    )
    notes = "".join(f'<p class="note">{esc(note)}</p>' for note in page.notes)
    source = f'<p class="source">{esc(page.source)}</p>' if page.source else ""
    plain = esc("".join(signs))
    return (
        '<div class="reader" id="reader">'
        f'<fieldset class="kinds" hidden><legend>Colour by surprise</legend>{choices}</fieldset>'
        f'<div class="panels">{panels}</div>'
        f'<noscript><p class="note">The text is coloured by {esc(page.layers[0].kind)} surprise; a script '
        "would switch to the other kinds.</p></noscript>"
        f'{source}<p class="readout" hidden><span class="sign"></span><span class="what"></span></p>'
        '<p class="vh" aria-live="polite" id="say"></p>'
        f'<div class="ink" id="ink">{_ink(signs, quantised[0][2])}</div>'
        '<p class="keys" id="keys" hidden>Point at the text to read a value. Or focus it: <kbd>←</kbd> '
        "<kbd>→</kbd> move by a character, <kbd>↑</kbd> <kbd>↓</kbd> by a line, <kbd>N</kbd> and "
        "<kbd>P</kbd> jump to the next and the previous sharp moment, <kbd>Esc</kbd> leaves.</p>"
        f'<details><summary>The same page as plain text</summary><div class="plain">{plain}</div></details>'
        f"{notes}</div>"
    )


def stripes(page: SurprisePage, n: int = 120) -> tuple[str, int]:
    """Return a row of at most `n` stripes, the mean level of equal stretches, and the characters in each."""
    signs, columns = clusters(page.text, [layer.values for layer in page.layers[:1]])
    if not columns or len(signs) < 2:
        return "", 0
    values = columns[0]
    step = math.ceil(len(values) / n)
    means = []
    for start in range(0, len(values), step):
        known = [v for v in values[start : start + step] if math.isfinite(v)]
        means.append(sum(known) / len(known) if known else math.nan)
    return "".join(f"<i class={LEVELS[max(0, level)]}></i>" for level in quantise(means)[2]), step


def _ink(signs: list[str], levels: list[int]) -> str:
    """Return the text as runs of equal level, line breaks and tabs apart so that they can be marked."""
    marks = {"\n": " N", "\t": " T"}
    keys = [("Z" if k < 0 else LEVELS[k], marks.get(s, "")) for s, k in zip(signs, levels, strict=True)]
    parts = []
    for (name, mark), run in groupby(zip(keys, signs, strict=True), key=lambda pair: pair[0]):
        pieces = [sign for _, sign in run]
        texts = pieces if mark else ["".join(pieces)]
        if name == LEVELS[0] and not mark:
            parts.append(esc(texts[0]))
            continue
        quoted = f'"{name}{mark}"' if mark else name
        parts += [f"<i class={quoted}>{esc(text)}</i>" for text in texts]
    return "".join(parts)


def _panel(
    index: int,
    layer: SurpriseLayer,
    signs: list[str],
    values: list[float],
    scale: Scale,
    codes: list[int],
    levels: list[int],
) -> str:
    """Return the legend, explanation and sharpest moments of one kind, with the data for the script."""
    packed = base64.b64encode(bytes(codes)).decode("ascii")
    edges = ",".join(map(str, scale.edges()))
    explanation = layer.explanation or _EXPLAIN.get(layer.kind, "")
    peaks = "".join(
        f"<li><span>{context}</span> <b>{number(value, 3)}&nbsp;{esc(layer.unit)}</b></li>"
        for context, value in _peaks(signs, values)
    )
    return (
        f'<section class="panel" data-kind="{esc(layer.kind)}" data-unit="{esc(layer.unit)}" '
        f'data-floor="{scale.floor!r}" data-top="{scale.top!r}" data-edges="{edges}" data-codes="{packed}">'
        f"<h3>{esc(layer.kind.capitalize())} surprise</h3>"
        f'<div class="two"><div><p>{esc(explanation)}</p>{_legend(index, layer, values, scale, levels)}</div>'
        f'<div><h4>Sharpest moments</h4><ol class="peaks">{peaks}</ol></div></div></section>'
    )


def _legend(index: int, layer: SurpriseLayer, values: list[float], scale: Scale, levels: list[int]) -> str:
    """Return the colour ramp with its numbers, under a histogram of how many characters each colour has."""
    n = len(LEVELS)
    share = 100 / n
    counts = [levels.count(k) for k in range(n)]
    most = max(1, *counts)
    bars = "".join(
        f'<rect class="count" x="{k * share + 0.3:.2f}%" y="{44 - 42 * c / most:.1f}" '
        f'width="{share - 0.6:.2f}%" height="{42 * c / most:.1f}"/>'
        for k, c in enumerate(counts)
    )
    swatches = "".join(
        f'<rect class="{LEVELS[k]}" x="{k * share:.2f}%" y="47" width="{share + 0.1:.2f}%" height="12"/>'
        for k in range(n)
    )
    ticks = "".join(
        f'<text x="{k * share:.2f}%" y="74" text-anchor="{anchor}">{sign}{number(scale.edge(k), 2)}</text>'
        for k, anchor, sign in (
            (0, "start", "≤ "),
            (8, "middle", ""),
            (16, "middle", ""),
            (24, "end", "≥ "),
        )
    )
    finite = sorted(v for v in values if math.isfinite(v))
    if not finite:
        return '<p class="note">Nothing was measured for this kind.</p>'
    middle, tenth, hundredth = (number(quantile(finite, q), 2) for q in (0.5, 0.9, 0.99))
    unit = esc(layer.unit)
    return (
        f'<svg class="ramp" role="img" width="100%" height="78" aria-labelledby="ramp{index}">'
        f'<title id="ramp{index}">Colour scale of {esc(layer.kind)} surprise from '
        f"{number(scale.low, 2)} to {number(scale.high, 2)} {unit}, with the number of characters per colour"
        f'</title>{bars}{swatches}<rect class="box" x="0" y="47" width="100%" height="12"/>{ticks}</svg>'
        f'<p class="note">{unit}, log scale; bars count characters. Half lie below {middle}, '
        f"one in ten above {tenth}, one in a hundred above {hundredth}.</p>"
    )


def _peaks(signs: list[str], values: list[float], n: int = 5, apart: int = 40) -> list[tuple[str, float]]:
    """Return the `n` highest characters at least `apart` characters from each other, each in its context."""
    order = sorted((i for i, v in enumerate(values) if math.isfinite(v)), key=lambda i: -values[i])
    chosen: list[int] = []
    for index in order:
        if all(abs(index - other) >= apart for other in chosen):
            chosen.append(index)
        if len(chosen) == n:
            break
    peaks = []
    for index in chosen:
        before = "".join(signs[max(0, index - 24) : index]).replace("\n", " ")
        after = "".join(signs[index + 1 : index + 19]).replace("\n", " ")
        sign = {"\n": "↵", "\t": "⇥", " ": "␣"}.get(signs[index], signs[index])
        peaks.append((f"…{esc(before)}<mark>{esc(sign)}</mark>{esc(after)}…", values[index]))
    return peaks
