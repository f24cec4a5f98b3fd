"""Acts two and three: learning to read a novel, and a page of it coloured by surprise."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from miras.core.algorithm import GradientDescent
from miras.core.memory import Matrix
from miras.core.rule import Rule
from miras.data.novel import Novel
from miras.data.tokens import ByteTokenizer
from miras.demo.meter import Clock, bar
from miras.demo.page import ConditionAverage, GeneratedText, LearningAct, SavedMemory, SurpriseAct
from miras.evaluate.stream import Curve as StreamCurve
from miras.evaluate.stream import stream_curve
from miras.nn.config import ModelConfig
from miras.nn.folder import save_model
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.nn.reading import StreamState, read_pieces
from miras.report.chart import Curve
from miras.report.watch import watch
from miras.stream.files import save_state
from miras.stream.generation import generate
from miras.stream.run import read
from miras.train.loop import Run
from miras.train.options import Settings
from miras.train.run import WINDOW, Means
from miras.train.tasks import TextTask
from miras.zoo import attention_twin, preset

BATCH, LENGTH, CHUNK = 4, 256, 32
LEAST = 10
"""Minimum number of training steps."""
HELD_OUT = 4.0
"""Seconds that determine how many held-out bytes are read under each condition."""
PAGE = 7000
CONDITIONS = ("learning", "reset", "frozen-warmed", "frozen")
NAMES = {
    "learning": "memory learning",
    "reset": "reset every 2,048 bytes",
    "frozen-warmed": "frozen after the first quarter",
    "frozen": "frozen from the start",
    "twin": "attention only",
}


def reading_config() -> ModelConfig:
    """A small byte-level titans-mag: linear memory, momentum, chunks of 32, a window of 64
    bytes."""
    return preset(
        "titans-mag",
        hidden_size=96,
        num_hidden_layers=3,
        num_heads=2,
        window_size=64,
        num_persistent=4,
        rule=Rule(Matrix(), algorithm=GradientDescent(momentum=True, step_bound=10.0), chunk_size=CHUNK),
        gates={"lr": Gate(scale=0.8), "momentum": Gate(scale=0.9), "forget": Gate(bias=-5.0)},
        initial_scale=0.0,
        tie_word_embeddings=True,
    )


def new_run(config: ModelConfig, novel: Novel, seed: int) -> Run:
    """A model of this config at the start of its training on the novel."""
    torch.manual_seed(seed)
    tokens = np.frombuffer(novel.train, np.uint8)
    task = TextTask(tokens, batch_size=BATCH, seq_len=LENGTH, align=CHUNK, seed=seed)
    return Run(LM(config), task, Settings(steps=LEAST, lr=4e-3, warmup=30, weight_decay=0.05))


def train_for(runs: dict[str, Run], seconds: float, console: Console) -> list[Curve]:
    """Train models alternately until time is up, so that all have read the same; returns one loss
    curve for each.

    The number of steps that fit is re-estimated before each step, so that the learning rate has
    decayed when time is up, however busy the machine became.
    """
    clock = Clock()
    means = {name: Means() for name in runs}
    curves = {name: Curve(name, [], [], role=_role(name)) for name in runs}
    step = 0
    with bar(console, "training both in turns", seconds) as show:
        while (spent := clock()) < seconds or step < LEAST:
            fit = max(step + 1, LEAST, round(step * seconds / spent) if step else 0)
            for name, run in runs.items():
                run.settings = replace(run.settings, steps=fit)
                row = run.advance()
                means[name].add(row)
                curves[name].x.append(row["tokens"])
                curves[name].y.append(means[name].of("bits_per_byte"))
            step += 1
            said = ", ".join(f"{name} {curve.y[-1]:.3f}" for name, curve in curves.items())
            show(min(clock(), seconds), f"{step:,} steps  bits per byte: {said}")
    for run in runs.values():
        run.model.eval()
    return list(curves.values())


def reading_act(
    novel: Novel, out: Path, seconds: float, seed: int, console: Console
) -> tuple[LearningAct, LM, int]:
    """Train a titans-mag and its twin, read the held-out chapters, write a paragraph, save and go
    on."""
    console.print(f"\n[bold]It learns to read.[/] {novel.title}, {len(novel.train):,} bytes to learn from.")
    config = reading_config()
    run, twin = (new_run(each, novel, seed) for each in (config, attention_twin(config)))
    loss = train_for({"titans-mag": run, "attention only": twin}, seconds, console)
    model = run.model
    save_model(model, out / "model")

    held = np.frombuffer(novel.heldout, np.uint8)
    curves = list(_held_out(model, twin.model, held, console))
    base = curves[0].mean
    averages = [ConditionAverage(NAMES[c.condition], c.mean, _against(c, base)) for c in curves]
    prompt = novel.heldout[:600].decode(errors="ignore")
    told = generate(
        model, np.frombuffer(prompt.encode(), np.uint8), 500, temperature=0.7, top_p=0.9, seed=seed
    )
    text = bytes(told).decode(errors="replace")
    tail = prompt[-160:]
    console.print(f"[dim]...{tail}[/][bold]{text}[/]", highlight=False)
    saved = save_and_go_on(model, held, out)
    console.print(
        f"Memory saved ({saved.bytes:,} bytes), loaded in a fresh process, read on: "
        f"largest difference {saved.max_difference:g}"
    )
    act = LearningAct(
        loss=loss,
        loss_x=f"training bytes; each point is the mean of the last {WINDOW} steps",
        held_out=[
            Curve(NAMES[c.condition], list(c.positions), list(c.bits_per_byte), role=_role(c.condition))
            for c in curves
        ],
        averages=averages,
        fair_reading=fair_reading(curves),
        book=f"{novel.title}, the last chapters",
        generated=GeneratedText(tail, text, f"temperature 0.7, top-p 0.9, seed {seed}"),
        saved=saved,
    )
    return act, model, run.step


def _role(condition: str) -> str:
    roles = {"learning": "memory", "titans-mag": "memory", "twin": "twin", "attention only": "twin"}
    return roles.get(condition, "")


def _against(curve: StreamCurve, base: float) -> str:
    return "" if curve.condition == "learning" else f"{curve.mean - base:+.3f} against the learning memory"


def _held_out(model: LM, twin: LM, held: np.ndarray, console: Console) -> Iterator[StreamCurve]:
    """Evaluate the held-out text under every condition; shorter on a slow machine, to keep the
    demo's time."""
    held = held[: _fitting(model, held, HELD_OUT)]
    with bar(console, f"reading {len(held):,} held-out bytes", len(held) * 5) as show:
        for i, condition in enumerate((*CONDITIONS, "twin")):
            said = NAMES[condition]
            curve = stream_curve(
                twin if condition == "twin" else model,
                held,
                "learning" if condition == "twin" else condition,
                warm=len(held) // 4,
                bins=40,
                progress=lambda done, i=i, said=said: show(i * len(held) + done, said),
            )
            yield StreamCurve(**{**vars(curve), "condition": condition})


def _fitting(model: LM, held: np.ndarray, seconds: float) -> int:
    """Measure how many bytes are read in that many seconds."""
    clock = Clock()
    count = 0
    for part in read_pieces(model, held):
        count += part.tokens.shape[1]
        if count >= 16_384 and clock() > seconds:
            break
    return count


def fair_reading(curves: list[StreamCurve]) -> list[str]:
    """What the comparison shows and what it does not, from its numbers."""
    mean = {c.condition: c.mean for c in curves}
    gain = mean["twin"] - mean["learning"]
    best = "below" if gain > 0 else "above"
    return [
        f"Against an attention-only twin of equal size, window and training bytes, the learning memory is "
        f"{abs(gain):.3f} bits per byte {best}. A minute of training on one seed is noise of about that size; "
        f"benchmarks/reading.py measures it on three paired seeds.",
        "Both trained in turns, step by step, so both have seen the same text. The twin is faster: at equal "
        "time it would have seen more.",
        "A frozen memory is something this model never met in training: it shows that the model depends on its "
        "memory, not what the memory is worth.",
        "Resetting also restarts attention and convolutions, every 2,048 bytes.",
    ]


def save_and_go_on(model: LM, held: np.ndarray, out: Path) -> SavedMemory:
    """Read half, save, and continue both here and in a fresh process that loads the file: are the
    losses equal?"""
    part, more = held[:8192], held[8192 : 8192 + 2048]
    state = read(model, part).state
    path = out / "memory.safetensors"
    save_state(path, state, model)
    (out / "more.bin").write_bytes(more.tobytes())
    # The loaded state must equal the one in memory, so both start from the same bytes and threads.
    here = read(model, more, state).losses
    command = [sys.executable, "-m", "miras.demo.fresh", str(out), str(torch.get_num_threads())]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    there = np.array(json.loads(told.stdout), dtype=np.float32)
    (out / "more.bin").unlink()
    return SavedMemory(
        file=path.name,
        bytes=path.stat().st_size,
        max_difference=float(np.abs(here[0] - there).max()),
        compared=f"the losses of the next {len(more):,} bytes",
    )


def surprise_act(model: LM, novel: Novel) -> SurpriseAct:
    """A page of the held-out text with what surprised the memory, after reading the previous
    chapters."""
    held = novel.heldout
    start = held.index(b"\n", min(20_000, len(held) // 2)) + 1
    text = held[start : start + PAGE].decode(errors="ignore")
    state: StreamState | None = None
    for part in read_pieces(model, np.frombuffer(held[:start], np.uint8)):
        state = part.state
    tokenizer = ByteTokenizer()
    watched = watch(model, tokenizer, tokenizer.encode(text), state)
    return SurpriseAct(watched, f"{novel.title}, from the held-out chapters, byte {start:,} on")
