"""Act one: a needle near the beginning of a million bytes, read as one stream."""

import json
from collections.abc import Iterator
from importlib import resources
from itertools import chain, count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from miras.core.observe import observe
from miras.data.needle import NOISE, NeedleTask
from miras.demo.meter import Clock, bar, process_memory_mb
from miras.demo.page import Haystack, NeedleAct
from miras.evaluate.needle import wilson
from miras.nn.lm import LM
from miras.nn.reading import read_pieces
from miras.report.chart import Curve
from miras.stream.generation import generate

Tokens = NDArray[np.uint8]

DEPTH = 0.01
DIGITS = 5
PIECE = 2048
SAMPLED = 48
"""One piece in this many is observed, and the needle's: observing forms each token's weights, which
is slow."""
SECONDS = 75.0
"""Seconds after which the memory model stops reading filler and gets the question: on a busy
machine the haystack is smaller."""
CHANCE = 100 / 90_000
"""Percent of needles found by guessing one of the five-digit numbers."""
MEASURED_BY = "python benchmarks/needle.py --full --write accuracy.json"

TEXTS = {
    "noise": "this filler",
    "books": "a novel",
    "chapters": "a novel's last chapters",
    "lorem": "lorem ipsum",
    "digits": "digits",
    "ledger": "a ledger",
}
"""Display names of the fillers in accuracy.json."""


def needle_act(
    models: dict[str, LM], size: int, seed: int, console: Console, *, retrained: bool = False
) -> NeedleAct:
    """Hide a needle, read everything with both models, ask for it, and report their answers."""
    task = NeedleTask(size, digits=DIGITS, depth=DEPTH)
    sample = task.sample(seed + 1_000_000, 0)
    place = sample.text.index(b"The special magic number")
    needle = sample.text[place : sample.text.index(b". ", place) + 1].decode()
    asked = sample.prompt.tobytes().rindex(b" What is")
    hay, question = sample.prompt[:asked], sample.prompt[asked:]
    console.print(f'\n[bold]A needle in a haystack.[/] At byte {place:,} of {size:,}: "{needle}"')
    clock = Clock()
    least = place + len(needle) + PIECE
    blocks = _until(hay, least, SECONDS, clock)
    answer, curves = _read(models["memory"], blocks, question, size, place, "reading, with memory", console)
    seconds = clock()
    read = int(curves["memory"].x[-1])
    notes: list[str] = []
    if read < len(sample.prompt):
        notes.append(
            f"The machine was slow or busy: reading stopped after {read:,} of {size:,} bytes, to keep the time."
        )
        console.print(notes[0])
    rest = _until(hay[: read - len(question)], size, SECONDS, clock)
    twin_answer, _ = _read(models["twin"], rest, question, read, place, "reading, attention only", console)
    said = {
        name: "right" if a == sample.value else "wrong" for name, a in (("m", answer), ("t", twin_answer))
    }
    text = question.tobytes().decode().strip()
    console.print(
        f'"{text}" - with memory: [bold]{answer}[/] ({said["m"]}), attention only: {twin_answer!r} ({said["t"]})'
    )
    rows = shipped_rows()
    return NeedleAct(
        needle=needle,
        key=sample.key,
        value=sample.value,
        answer=answer,
        twin_answer=twin_answer,
        question=text,
        haystack=NOISE.decode(),
        needle_position=place,
        twin_window=models["twin"].config.pattern[0].sees()["window_size"],
        bytes_read=read,
        seconds=seconds,
        process_memory=curves["memory"],
        write_rate=curves["lr"],
        memory_norm=curves["weight"],
        watched_of=SAMPLED,
        retrained=retrained,
        accuracy=shipped_accuracy(rows),
        chance=CHANCE,
        command=MEASURED_BY,
        others=other_texts(rows),
        notes=notes,
    )


def _until(hay: Tokens, least: int, seconds: float, clock: Clock) -> Iterator[Tokens]:
    """A text in pieces; when time is up, at least `least` bytes of it."""
    for start in range(0, len(hay), PIECE):
        if start >= least and clock() > seconds:
            return
        yield hay[start : start + PIECE]


def _read(
    model: LM, hay: Iterator[Tokens], question: Tokens, size: int, place: int, what: str, console: Console
) -> tuple[str, dict[str, Curve]]:
    """The digits a model gives after filler and question, and what it and the process did on the
    way."""
    xs: list[float] = []
    memory: list[float] = []
    watched: list[tuple[float, float, float]] = []
    with observe():  # what the first calls allocate is not the stream's
        for _ in read_pieces(model, np.tile(question, 2 * PIECE // len(question)), piece=PIECE):
            pass
    clock = Clock()
    pieces = read_pieces(model, chain(hay, [question]), piece=PIECE)
    state = None
    with bar(console, what, size) as show:
        for number in count():
            with observe(active=number % SAMPLED == 0 or number == place // PIECE) as seen:
                part = next(pieces, None)
            if part is None:
                break
            state = part.state
            read = part.start + part.tokens.shape[1]
            xs.append(read)
            memory.append(process_memory_mb())
            for layer in seen.layers():
                values = seen[layer]
                rate, weight = (float(values[name].mean()) for name in ("lr", "weight"))
                watched.append((part.start + part.tokens.shape[1] / 2, rate, weight))
            show(read, f"{read:,} bytes  {read / clock():,.0f} bytes/s  {memory[-1]:,.0f} MB")
    assert state is not None
    none = question[:0]
    answer = bytes(generate(model, none, DIGITS, temperature=0, state=state)).decode(errors="replace")
    at = [x for x, _, _ in watched]
    return answer, {
        "memory": Curve("process memory", xs, memory, role="memory"),
        "lr": Curve("mean step taken", at, [r for _, r, _ in watched], role="memory"),
        "weight": Curve("|W|", at, [w for _, _, w in watched], role="memory"),
    }


def shipped_rows() -> list[dict[str, Any]]:
    """The rows of accuracy.json for one needle: what was measured for the shipped models; none
    where nothing was."""
    file = resources.files("miras.demo") / "assets" / "accuracy.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return [r for r in rows if r.get("needles", 1) == 1 and r.get("kinds") != "all"]


def other_texts(rows: list[dict[str, Any]]) -> list[Haystack]:
    """Needles found in each kind of text, at each measured length, for texts other than the
    act's."""
    lengths = {r["length"] for r in rows if r["filler"] != "noise"}
    share = {(r["filler"], r["length"], r["model"]): 100 * r["accuracy"] for r in rows}
    return [
        Haystack(TEXTS.get(kind) or kind, length, share[kind, length, "memory"], twin, r["n"])
        for r in rows
        if r["model"] == "memory" and r["length"] in lengths
        for kind, length in [(r["filler"], r["length"])]
        if (twin := share.get((kind, length, "twin"))) is not None
    ]


def shipped_accuracy(rows: list[dict[str, Any]]) -> list[Curve]:
    """Needles found over context length in percent, measured for the shipped models."""
    curves: list[Curve] = []
    for role, name in (("memory", "with memory"), ("twin", "attention only")):
        own = [r for r in rows if r["model"] == role and r["filler"] == "noise"]
        own.sort(key=lambda r: r["length"])
        ends = [wilson(r["correct"], r["n"]) for r in own]
        curves.append(
            Curve(
                name,
                [r["length"] for r in own],
                [100 * r["correct"] / r["n"] for r in own],
                [100 * low for low, _ in ends],
                [100 * high for _, high in ends],
                [r["n"] for r in own],
                role,
            )
        )
    return curves
