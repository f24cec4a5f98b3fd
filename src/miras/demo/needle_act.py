"""Act one: a needle near the beginning of a million bytes, read as one stream."""

import json
from importlib import resources

import numpy as np
from rich.console import Console

from miras.core.observe import observe
from miras.data.needle import NeedleTask
from miras.demo.meter import Clock, bar, process_memory_mb
from miras.nn.lm import LM
from miras.nn.reading import read_pieces
from miras.report import AccuracyPoint, AccuracySeries, Curve, NeedleAccuracy, NeedleAct
from miras.stream.generation import generate

DEPTH = 0.01
PIECE = 8192
SAMPLED = 12
"""One piece in this many is watched: an observation forms each token's weights, which takes its time."""
MEASURED_BY = "python benchmarks/needle.py --full --write accuracy.json"


def needle_act(models: dict[str, LM], size: int, seed: int, console: Console) -> NeedleAct:
    """Hide a needle, read everything with both models, ask, and say what they answered."""
    task = NeedleTask(size, depth=DEPTH)
    sample = task.sample(seed + 1_000_000, 0)
    place = sample.text.index(b"The special magic number")
    needle = sample.text[place : sample.text.index(b". ", place) + 1].decode()
    question = sample.prompt.tobytes()[-43:].decode().strip()
    console.print(f'\n[bold]It finds a needle in a million.[/] At byte {place:,} of {size:,}: "{needle}"')
    clock = Clock()
    answer, curves = _read(models["memory"], sample.prompt, task.digits, "reading, with memory", console)
    seconds = clock()
    twin_answer, _ = _read(models["twin"], sample.prompt, task.digits, "reading, attention only", console)
    said = {
        name: "right" if a == sample.value else "wrong" for name, a in (("m", answer), ("t", twin_answer))
    }
    console.print(
        f'"{question}" - with memory: [bold]{answer}[/] ({said["m"]}), attention only: {twin_answer!r} ({said["t"]})'
    )
    return NeedleAct(
        needle=needle,
        key=sample.key,
        value=sample.value,
        answer=answer,
        correct=answer == sample.value,
        bytes_read=size,
        seconds=seconds,
        peak_memory_mb=max(curves["memory"].y),
        twin_answer=twin_answer,
        twin_correct=twin_answer == sample.value,
        question=question,
        needle_position=place,
        twin_window=models["twin"].config.window_size,
        accuracy=shipped_accuracy(),
        process_memory=[curves["memory"]],
        write_rate=[curves["lr"]],
        memory_norm=[curves["weight"]],
    )


def _read(
    model: LM, prompt: np.ndarray, digits: int, what: str, console: Console
) -> tuple[str, dict[str, Curve]]:
    """The digits a model gives after a prompt, and what it and the process did on the way."""
    xs: list[float] = []
    memory: list[float] = []
    watched: list[tuple[float, float, float]] = []
    with observe():  # what the first calls allocate is not the stream's
        for _ in read_pieces(model, prompt[: 2 * PIECE], piece=PIECE):
            pass
    clock = Clock()
    pieces = read_pieces(model, prompt, piece=PIECE)
    state = None
    with bar(console, what, len(prompt)) as show:
        for number in range(-(-len(prompt) // PIECE) + 1):
            with observe(active=number % SAMPLED == 0) as seen:
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
    answer = bytes(generate(model, prompt[:0], digits, temperature=0, state=state)).decode(errors="replace")
    at = [x for x, _, _ in watched]
    return answer, {
        "memory": Curve("process memory", xs, memory, role="memory"),
        "lr": Curve("mean step taken", at, [r for _, r, _ in watched], role="memory"),
        "weight": Curve("|W|", at, [w for _, _, w in watched], role="memory"),
    }


def shipped_accuracy() -> NeedleAccuracy | None:
    """Accuracy over context length, as it was measured for the shipped models; None where it was not."""
    file = resources.files("miras.demo") / "assets" / "accuracy.json"
    if not file.is_file():
        return None
    rows = json.loads(file.read_text())
    series: list[AccuracySeries] = []
    for role, name in (("memory", "with memory"), ("twin", "attention only")):
        points = [
            AccuracyPoint.from_counts(r["length"], r["correct"], r["n"])
            for r in rows
            if r["model"] == role and r["filler"] == "noise"
        ]
        series.append(AccuracySeries(name, sorted(points, key=lambda p: p.context), role))
    return NeedleAccuracy(series, precomputed=True, command=MEASURED_BY, chance=100 / 90_000)
