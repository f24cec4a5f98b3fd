"""The contents of a surprise page: a text, token by token, and what the memories did along it."""

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miras.report.text import number, visible

Values = NDArray[np.float32]

TOKEN_VALUES = 450_000
"""About the most per-token values of a page; beyond, it shows means over heads, then fewer
layers."""
GATE_VALUES = 64_000
"""About the most gate values of a page; a longer text has means over several tokens."""

SURPRISES = ("momentary", "accumulated")
MISSING = 255
"""The code for missing values."""

# Control characters that reorder the text after them.
_DIRECTIONS = {code: "⇄" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@dataclass(frozen=True)
class Quantity:
    """The names of a quantity in a sentence and in a table, its unit and its meaning."""

    label: str
    short: str
    unit: str
    meaning: str


QUANTITIES = {
    "predictive": Quantity(
        "Predictive surprise",
        "predictive",
        "bits",
        "The number of bits the model needed to predict the token: 0 bits is certain.",
    ),
    "momentary": Quantity(
        "Momentary surprise |grad|",
        "momentary",
        "gradient norm",
        "How strongly the token changes the memory: the norm of the gradient of the memory’s own loss.",
    ),
    "accumulated": Quantity(
        "Accumulated surprise |S|",
        "accumulated",
        "norm of S",
        "What the memory is updated with: this token’s step plus what momentum keeps of earlier steps. It rises at "
        "an event and decays after it.",
    ),
    "lr": Quantity("Step taken, lr", "step", "", "The step size of the memory for the token."),
    "momentum": Quantity("Momentum", "momentum", "", "The fraction of past surprise that is carried on."),
    "forget": Quantity(
        "Retention, 1 − forget", "retention", "", "The fraction of the memory that is kept at the token."
    ),
    "weight": Quantity("Size of the memory |W|", "|W|", "", "The norm of all weights of the memory."),
    "loss": Quantity(
        "Inner loss",
        "inner loss",
        "",
        "The memory’s own loss: how far its read for the key is from the value.",
    ),
}


@dataclass(frozen=True)
class Watched:
    """The result of reading T tokens.

    pieces: the text each token completes, "" for an incomplete character; bits (T,) predictive
    surprise, NaN without a prediction; memories {layer: {name: (H, T)}} by the names of
    `miras.observe`; before: number of tokens read earlier.
    """

    pieces: list[str]
    bits: Values
    memories: dict[int, dict[str, Values]]
    before: int = 0


@dataclass(frozen=True)
class Track:
    """One track of the page: `values` (n,), each the mean over `every` tokens.

    layer: None for the whole model; head: None for the mean over heads.
    """

    name: str
    layer: int | None
    head: int | None
    every: int
    values: Values


def tracks_of(watched: Watched, thin: bool = True) -> list[Track]:
    """The tracks that fit on a small page: every layer and head, or means over heads; with `thin`
    also fewer layers.

    Surprise keeps one value per token. Gates are means over as many tokens as necessary.
    """
    memories, count = watched.memories, len(watched.pieces)
    room = TOKEN_VALUES // count - 1
    rows = {n: sum(name in SURPRISES for name in seen) for n, seen in memories.items()}
    by_head = sum(k * len(memories[n]["momentary"]) for n, k in rows.items()) <= room
    shown = list(memories)
    if thin and sum(rows.values()) > room:
        fit = max(1, min(len(shown), room // max(rows.values())))
        shown = [shown[int(i)] for i in np.linspace(0, len(shown) - 1, fit).round()]

    def heads(values: Values) -> list[tuple[int | None, Values]]:
        return list(enumerate(values)) if by_head else [(None, values.mean(0))]

    parts = [
        (name, n, head, row)
        for n in shown
        for name, values in sorted(memories[n].items(), key=lambda item: _order(item[0]))
        for head, row in heads(values)
    ]
    gates = sum(name not in SURPRISES for name, *_ in parts)
    every = max(1, math.ceil(gates * count / GATE_VALUES))
    tracks = [Track("predictive", None, None, 1, watched.bits)]
    for name, n, head, row in parts:
        step = 1 if name in SURPRISES else every
        tracks.append(Track(name, n, head, step, row if step == 1 else _means(row, step)))
    return tracks


def shortened(watched: Watched, tracks: Sequence[Track]) -> str:
    """A sentence on what the page leaves out and how to get it, or ""."""
    shown = {track.layer for track in tracks} - {None}
    if not watched.memories:
        return ""
    left = len(watched.memories) - len(shown)
    means = all(track.head is None for track in tracks)
    if not left and not means:
        return ""
    layers = f"layers {', '.join(str(n) for n in watched.memories if n in shown)} of {len(watched.memories)}"
    what = [*([layers] * (left > 0)), *(["means over heads"] * means)]
    return (
        f"To stay small the page shows {' and '.join(what)}. Name a layer with --layers, or read fewer --tokens, "
        "to see more."
    )


def page_data(watched: Watched, tracks: Sequence[Track], kind: str = "momentary") -> dict[str, Any]:
    """The data for the page's script; `kind` is the surprise that colours the text initially."""
    meta, blob = pack(watched, tracks)
    return {**meta, "kind": kind, "blob": base64.b64encode(blob).decode("ascii")}


def pack(watched: Watched, tracks: Sequence[Track]) -> tuple[dict[str, Any], bytes]:
    """The data for the page's script, and its compressed bytes: text, lengths, codes of each track.

    The text is UTF-8; lengths are T uint16 (little-endian), the UTF-16 units of each token's text;
    codes are those of `coded`, one byte per value.
    """
    pieces = [visible(piece).translate(_DIRECTIONS) for piece in watched.pieces]
    text = "".join(pieces).encode("utf-8")
    lengths = np.array([len(piece.encode("utf-16-le")) // 2 for piece in pieces], dtype="<u2")
    parts = [text, lengths.tobytes()]
    shown: list[dict[str, Any]] = []
    for track in tracks:
        meaning, codes = coded(track.values)
        parts.append(codes)
        shown.append(
            {"name": track.name, "layer": track.layer, "head": track.head, "every": track.every, **meaning}
        )
    quantities = {name: asdict(quantity) for name, quantity in _named(tracks).items()}
    meta = {
        "tokens": len(pieces),
        "before": watched.before,
        "text": len(text),
        "quantities": quantities,
        "tracks": shown,
    }
    return meta, zlib.compress(b"".join(parts), 9)


def coded(values: Values) -> tuple[dict[str, float], bytes]:
    """Values (n,) as one byte each, 255 for missing values, and the scale of the others.

    1 to 254 go from `floor` to `top` in equal ratios, 0 is below `floor`; if some values are
    negative, 0 to 254 go from `least` to `most` in equal steps.
    """
    known = np.isfinite(values)
    codes = np.full(len(values), MISSING, np.uint8)
    finite = values[known].astype(np.float64)
    if finite.size and finite.min() < 0:
        least, most = float(finite.min()), float(finite.max())
        codes[known] = (254 * (finite - least) / ((most - least) or 1)).round()
        return {"least": least, "most": most}, codes.tobytes()
    floor, top = _span(finite)
    shares = np.log(np.maximum(finite, floor) / floor) / math.log(top / floor)
    codes[known] = np.where(finite < floor, 0, np.minimum(254, 1 + (253 * shares).round()))
    return {"floor": floor, "top": top}, codes.tobytes()


def _span(finite: NDArray[np.float64]) -> tuple[float, float]:
    """The smallest and the largest value that codes distinguish: a tenth of the calmest colour's,
    and the largest."""
    positive = finite[finite > 0]
    if not positive.size:
        return 1.0, 10.0
    top = float(positive.max())
    high = float(np.quantile(finite, 0.995)) or top
    low = max(float(np.quantile(finite, 0.05)), high / 100)
    if high <= low * 1.000001:
        low, top = low / 10, max(top, high * 10)
    return min(low, max(float(positive.min()), low / 10)), top


def heat(values: Values, count: int) -> tuple[list[float], int]:
    """At most `count` stripes, each the mean of equally many values, from 0 (calm) to 1, and that
    number of values.

    The scale is that of the coloured text: a log scale from the 5 % to the 99.5 % quantile, at most
    two decades.
    """
    every = math.ceil(len(values) / count)
    known = np.isfinite(values)
    means = _means(np.where(known, values, 0), every) / np.maximum(
        _means(known.astype(np.float32), every), 1e-9
    )
    high = float(np.quantile(means, 0.995)) or 1.0
    low = max(float(np.quantile(means, 0.05)), high / 100)
    shares = np.log(np.maximum(means, low) / low) / (math.log(high / low) or 1.0)
    return [round(float(share), 3) for share in np.clip(shares, 0, 1)], every


def agreement(watched: Watched) -> str:
    """The rank correlations between the memories' surprise and the model's own, as text; "" without
    a memory."""
    known = np.isfinite(watched.bits)
    told: list[str] = []
    for name in SURPRISES:
        rows = [seen[name].mean(0) for seen in watched.memories.values() if name in seen]
        if rows and known.sum() > 1:
            correlation = rank_correlation(watched.bits[known], np.mean(rows, axis=0)[known])
            told.append(f"{name} {correlation:+.2f}")
    if not told:
        return ""
    return (
        f"Rank correlation with predictive surprise over this text (1: the same order, 0: unrelated, -1: the "
        f"opposite order), as means over layers and heads: {', '.join(told)}."
    )


def rank_correlation(a: Sequence[float] | Values, b: Sequence[float] | Values) -> float:
    """Spearman's correlation of two sequences; ties have the mean of their ranks."""
    ranks: list[NDArray[np.float64]] = []
    for values in (a, b):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append(np.take(np.cumsum(count) - (count - 1) / 2, place))
    return float(np.asarray(np.corrcoef(ranks))[0, 1]) if all(np.ptp(each) for each in ranks) else math.nan


def bits_per_byte(watched: Watched) -> float:
    """Mean predictive surprise in bits per byte of text, over the predicted tokens."""
    known = ~np.isnan(watched.bits)
    size = sum(len(piece.encode("utf-8")) for piece, here in zip(watched.pieces, known, strict=True) if here)
    return float(watched.bits[known].sum(dtype=np.float64)) / size if size else math.nan


def facts_of(watched: Watched, model: str, described: str, more: bool) -> list[tuple[str, str, str]]:
    """The facts above the page: the model, what was read, how well it was predicted, its
    memories."""
    count = len(watched.pieces)
    remarks = [
        *([f"after {watched.before:,} earlier"] * (watched.before > 0)),
        *(["the text is longer"] * more),
    ]
    heads = {len(seen["momentary"]) for seen in watched.memories.values()}
    layers = ", ".join(map(str, watched.memories)) or "none"
    return [
        ("Model", model, described),
        ("Read", f"{count:,} tokens", ", ".join(remarks)),
        (
            "Predicted with",
            f"{number(bits_per_byte(watched))} bits per byte",
            "0 is certain, 8 a blind guess",
        ),
        ("Layers watched", layers, f"{max(heads)} heads each" if heads else "predictive surprise only"),
    ]


def _named(tracks: Sequence[Track]) -> dict[str, Quantity]:
    """The quantities of the tracks, in order; a gate without a description has its name."""
    names = dict.fromkeys(track.name for track in tracks)
    return {name: QUANTITIES.get(name, Quantity(name, name, "", "A gate of the rule.")) for name in names}


def _order(name: str) -> int:
    known = list(QUANTITIES)
    return known.index(name) if name in known else len(known)


def _means(values: Values, every: int) -> Values:
    """(T,) -> (ceil(T / every),), the means of that many values each, the last of the remainder."""
    starts = np.arange(0, len(values), every)
    counts = np.diff(starts, append=len(values))
    return (np.add.reduceat(values.astype(np.float64), starts) / counts).astype(np.float32)
