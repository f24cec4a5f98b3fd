"""Acts two and three: learning to read a novel, and a page of it coloured by surprise."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from miras.core.algorithm import GradientDescent
from miras.core.memory import Matrix
from miras.core.observe import observe
from miras.core.rule import Rule
from miras.data.novel import Novel
from miras.demo.meter import Clock, bar
from miras.evaluate.stream import Curve as StreamCurve
from miras.evaluate.stream import stream_curve
from miras.nn.config import ModelConfig
from miras.nn.folder import save_model
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.nn.reading import StreamState, read_pieces
from miras.report import (
    ConditionAverage,
    Curve,
    GeneratedText,
    LearningAct,
    SavedMemory,
    SurpriseLayer,
    SurprisePage,
)
from miras.stream.files import save_state
from miras.stream.generation import generate
from miras.stream.run import read
from miras.train.loop import Run
from miras.train.options import Settings
from miras.train.tasks import TextTask
from miras.zoo import attention_twin, preset

BATCH, LENGTH, CHUNK = 4, 256, 32
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
    """A small byte-level titans-mag: linear memory, momentum, chunks of 32, a window of 64 bytes."""
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


def new_run(config: ModelConfig, novel: Novel, steps: int, seed: int) -> Run:
    """A model of this config at the start of its training on the novel."""
    torch.manual_seed(seed)
    tokens = np.frombuffer(novel.train, np.uint8)
    task = TextTask(tokens, batch_size=BATCH, seq_len=LENGTH, align=CHUNK, seed=seed)
    return Run(LM(config), task, Settings(steps=steps, lr=4e-3, warmup=30, weight_decay=0.05))


def train_for(run: Run, seconds: float | None, what: str, role: str, console: Console) -> Curve:
    """Train until the run's steps are done, and first set how many they are when it has `seconds`."""
    clock = Clock()
    xs: list[float] = []
    ys: list[float] = []
    shown = None
    probe = 6
    with bar(console, what, 1.0) as show:
        while run.step < run.settings.steps:
            row = run.advance()
            if seconds is not None and run.step == probe:
                # The first steps tell how many fit; from here on the schedule knows its end.
                pace = clock() / probe
                steps = max(probe + 4, int(seconds / pace))
                run.settings = Settings(**{**vars(run.settings), "steps": steps})
            shown = row["bits_per_byte"] if shown is None else 0.95 * shown + 0.05 * row["bits_per_byte"]
            xs.append(row["tokens"])
            ys.append(shown)
            rate = row["tokens"] / clock()
            show(run.step / run.settings.steps, f"{shown:.3f} bits per byte  {rate:,.0f} bytes/s")
    run.model.eval()
    return Curve("titans-mag" if role == "memory" else "attention only", xs, ys, role=role)


def reading_act(
    novel: Novel, out: Path, seconds: float, seed: int, console: Console
) -> tuple[LearningAct, LM, int]:
    """Train a titans-mag and its twin, read the held-out chapters, write a paragraph, save and go on."""
    console.print(f"\n[bold]It learns to read.[/] {novel.title}, {len(novel.train):,} bytes to learn from.")
    config = reading_config()
    twin_config = attention_twin(config)
    run = new_run(config, novel, 10**6, seed)
    loss = [train_for(run, seconds, "titans-mag", "memory", console)]
    twin = new_run(twin_config, novel, run.settings.steps, seed)
    loss.append(train_for(twin, None, "attention-only twin", "twin", console))
    model = run.model
    save_model(model, out / "model")

    held = np.frombuffer(novel.heldout, np.uint8)
    curves = list(_held_out(model, twin.model, held, console))
    base = curves[0].mean
    averages = [
        ConditionAverage(NAMES[c.condition], c.mean, _against(c, base), role=_role(c.condition))
        for c in curves
    ]
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
        loss_x="training bytes",
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
    return act, model, run.settings.steps


def _role(condition: str) -> str:
    return {"learning": "memory", "twin": "twin"}.get(condition, "")


def _against(curve: StreamCurve, base: float) -> str:
    return "" if curve.condition == "learning" else f"{curve.mean - base:+.3f} against the learning memory"


def _held_out(model: LM, twin: LM, held: np.ndarray, console: Console) -> Iterator[StreamCurve]:
    """The held-out text under every condition; shorter on a slow machine, so that the demo keeps its time."""
    clock = Clock()
    read(model, held[:4096])
    budget = int(4.0 * 4096 / clock())
    held = held[: max(16_384, min(len(held), budget))]
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


def fair_reading(curves: list[StreamCurve]) -> list[str]:
    """What the comparison says and what it does not, from its numbers."""
    mean = {c.condition: c.mean for c in curves}
    gain = mean["twin"] - mean["learning"]
    best = "below" if gain > 0 else "above"
    return [
        f"Against an attention-only twin of equal size, window and training bytes, the learning memory is "
        f"{abs(gain):.3f} bits per byte {best}. A minute of training on one seed is noise of about that size; "
        f"benchmarks/reading.py measures it on three paired seeds.",
        "The twin is faster, so at equal time it would have seen more text.",
        "A frozen memory is something this model never met in training: it shows that the model depends on its "
        "memory, not what the memory is worth.",
        "Resetting also begins attention and convolutions anew, every 2,048 bytes.",
    ]


def save_and_go_on(model: LM, held: np.ndarray, out: Path) -> SavedMemory:
    """Read half, save, and read on here and in a fresh process that loads the file: the same losses?"""
    part, more = held[:8192], held[8192 : 8192 + 2048]
    state = read(model, part).state
    path = out / "memory.safetensors"
    save_state(path, state, model)
    (out / "more.bin").write_bytes(more.tobytes())
    # What is read from the file must equal what was never saved, so both start from the same bytes and threads.
    here = read(model, more, state).losses
    command = [sys.executable, "-m", "miras.demo.fresh", str(out), str(torch.get_num_threads())]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    there = np.array(json.loads(told.stdout), dtype=np.float32)
    (out / "more.bin").unlink()
    return SavedMemory(
        file=path.name,
        bytes=path.stat().st_size,
        max_difference=float(np.abs(here[0] - there).max()),
        fresh_process=True,
        compared=f"the losses of the next {len(more):,} bytes",
    )


def surprise_act(model: LM, novel: Novel) -> SurprisePage:
    """A page of the held-out text with what surprised the memory, after it has read the chapters before."""
    held = novel.heldout
    start = min(20_000, len(held) // 2)
    start = held.index(b"\n", start) + 1
    text = held[start : start + PAGE].decode(errors="ignore")
    page = np.frombuffer(text.encode(), np.uint8)
    state: StreamState | None = None
    for part in read_pieces(model, np.frombuffer(held[:start], np.uint8)):
        state = part.state
    with observe() as seen:
        losses = read(model, page, state).losses[0]
    values = {"predictive": losses / np.log(2)}
    for kind in ("momentary", "accumulated"):
        each = [seen[layer][kind][0].mean(0).numpy() for layer in seen.layers()]
        values[kind] = np.mean(each, axis=0)
    sizes = [len(c.encode()) for c in text]
    ends = np.cumsum([0, *sizes])
    layers: list[SurpriseLayer] = []
    for kind, unit, fold, explanation in (
        ("momentary", "gradient norm", np.max, "how hard each character pulls at the memory's weights"),
        ("accumulated", "norm of S", np.max, "the momentum of surprise: what still echoes"),
        ("predictive", "bits", np.sum, "how unexpected the character is to the whole model"),
    ):
        per_character = [float(fold(values[kind][a:b])) for a, b in pairwise(ends)]
        layers.append(SurpriseLayer(kind, unit, per_character, explanation))
    return SurprisePage(
        text=text,
        layers=layers,
        source=f"{novel.title}, from the held-out chapters, byte {start:,} on",
        notes=["Memory surprise is averaged over layers and heads; read after the chapters before it."],
    )
