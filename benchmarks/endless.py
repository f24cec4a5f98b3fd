"""Ten million tokens through small models that write all the way: memory, speed, loss, needles.

    python benchmarks/endless.py                              # all of it: hours on a core; resumable
    python benchmarks/endless.py --only train read            # some of its parts, in this order
    python benchmarks/endless.py --tokens 1000000 --only read --out runs/short

Parts: `train` titans-mac and titans-mag on the embedded novel; `read` ten million bytes of it, over and over, as one
stream each in a process of its own; `pace` blocks and single tokens in turns from the states after 100,000 and after
all; `needles` in noise at several depths, with the shipped needle model; `plot` what `read` found. Each part keeps
what it found under --out, reading every million bytes, and is not run again when it is there.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from miras.core.algorithm import GradientDescent
from miras.core.memory import MLP
from miras.core.observe import observe
from miras.core.rule import Rule
from miras.data.needle import NeedleTask
from miras.data.novel import load_novel
from miras.demo.needle import load as load_needle_models
from miras.evaluate.needle import wilson
from miras.nn.config import ModelConfig
from miras.nn.folder import load_model, save_model
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.nn.reading import read_pieces
from miras.store.files import write_atomically
from miras.stream.files import load_state, save_state
from miras.train.loop import Run
from miras.train.options import Settings
from miras.train.tasks import TextTask
from miras.zoo import preset

MODELS = ("titans-mac", "titans-mag")
PIECE, ROW, EARLY, SAVED = 1024, 102_400, 102_400, 1_024_000
"""Tokens read at once, of one row of what `read` finds, after which a stream is warm, and between saves."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768", "MALLOC_ARENA_MAX": "1"}
"""Left to itself, glibc moves its thresholds while it runs, and the heap's shape with them: 10 MB either way."""


def config(name: str) -> ModelConfig:
    """Two layers, two heads, deep memories with momentum that forget, attention over 128 bytes."""
    rule = Rule(MLP(expansion=2), algorithm=GradientDescent(momentum=True, step_bound=2.0), chunk_size=64)
    return preset(name).changed(
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 2,
            "window_size": 128,
            "segment_size": 128,
            "num_persistent": 4,
            "rule": rule,
            "gates": {"lr": Gate(), "momentum": Gate(scale=0.5), "forget": Gate(bias=-5.0)},
            "tie_word_embeddings": True,
        }
    )


def train(out: Path, steps: int) -> None:
    """Train both on the novel, with carried states."""
    text = np.frombuffer(load_novel().train, np.uint8)
    for name in MODELS:
        if (out / name / "config.json").exists():
            continue
        torch.manual_seed(0)
        made = config(name)
        task = TextTask(
            text, np.array([0, len(text)]), batch_size=8, seq_len=256, align=made.stride(), seed=0
        )
        run = Run(LM(made), task, Settings(steps=steps, lr=4e-3, warmup=50, weight_decay=0.05))
        for row in run.until(steps):
            if row["step"] % 50 == 0:
                print(f"{name} step {row['step']} {row['bits_per_byte']:.3f} bits per byte", flush=True)
        save_model(run.model, out / name)


def text(start: int, stop: int) -> Iterator[np.ndarray]:
    """Bytes `start` to `stop` of the novel read over and over."""
    novel = np.frombuffer(load_novel().train, np.uint8)
    for at in range(start, stop, PIECE):
        yield novel.take(np.arange(at, min(stop, at + PIECE)), mode="wrap")


def read(out: Path, name: str, total: int) -> None:
    """Read `total` bytes as one stream; for every ROW of them loss, CPU time, memory, what the memory did."""
    model = load_model(out / name).eval()
    rows_file, state_file = out / f"{name}.json", out / f"{name}.safetensors"
    rows: list[dict[str, Any]] = json.loads(rows_file.read_text()) if state_file.exists() else []
    state = load_state(state_file, model)[0] if rows else None
    done = len(rows) * ROW if rows else 0
    if rows and int(load_state(state_file, model)[0].tokens[0]) != done:
        raise SystemExit(f"{rows_file} and {state_file} do not belong together; remove both")
    while done < total:
        stop = min(total, done + ROW)
        # The last piece is watched, the others are timed.
        nats, began = [], time.process_time()
        for part in read_pieces(model, text(done, stop - PIECE), state, piece=PIECE):
            nats.append(part.losses)
        seconds = time.process_time() - began
        with observe() as seen:
            *_, last = read_pieces(model, text(stop - PIECE, stop), part.state, piece=PIECE)
        watched, state = watch(seen), last.state
        losses = np.concatenate([*nats, last.losses], 1)
        if stop == EARLY:
            save_state(out / f"{name}-early.safetensors", state, model)
        rows.append(
            {
                "tokens": stop,
                "bits_per_byte": float(np.nanmean(losses)) / math.log(2),
                "finite": bool(np.isfinite(losses[:, 1:]).all()),
                "cpu_us_per_token": seconds / (stop - done - PIECE) * 1e6,
                "peak_mb": peak(),
                **watched,
            }
        )
        print(f"{name} {json.dumps(rows[-1])}", flush=True)
        done = stop
        if done % SAVED == 0 or done == total:
            save_state(state_file, state, model)
            write_atomically(rows_file, (json.dumps(rows) + "\n").encode())


def peak() -> float:
    """The most megabytes this process has held, since it began and not since its parent did (as ru_maxrss is)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def watch(seen: Any) -> dict[str, dict[str, float]]:
    """Means over a piece, by layer: the step taken, the share forgotten, |W|."""
    found: dict[str, dict[str, float]] = {}
    for layer in seen.layers():
        values = seen[layer]
        found[layer] = {n: float(values[n].double().mean()) for n in ("lr", "forget", "weight")}
    return found


def pace(out: Path, total: int, rounds: int) -> None:
    """Microseconds of CPU per token, in blocks and one at a time, from an early and a late state in turns."""
    found: dict[str, Any] = {}
    for name in MODELS:
        model = load_model(out / name).eval()
        states = {
            n: load_state(out / f"{name}{tail}.safetensors", model)[0]
            for n, tail in (("early", "-early"), ("late", ""))
        }
        spent: dict[str, dict[str, list[float]]] = {k: {n: [] for n in states} for k in ("block", "single")}
        block = next(text(total, total + PIECE))
        ids = torch.from_numpy(block[:128].astype(np.int64))[None]
        for turn in range(rounds):
            for n in states if turn % 2 else reversed(states):
                began = time.process_time()
                for _ in read_pieces(model, block, states[n], piece=PIECE):
                    pass
                spent["block"][n].append((time.process_time() - began) / PIECE * 1e6)
                began, state = time.process_time(), states[n]
                with torch.no_grad():
                    for t in range(ids.shape[1]):
                        _, state = model(ids[:, t : t + 1], state)
                spent["single"][n].append((time.process_time() - began) / ids.shape[1] * 1e6)
        found[name] = {k: {n: median(x) for n, x in by.items()} for k, by in spent.items()}
        print(name, json.dumps(found[name]), flush=True)
    write_atomically(out / "pace.json", (json.dumps(found, indent=1) + "\n").encode())


def needles(out: Path, lengths: list[int], depths: list[float], n: int) -> None:
    """Accuracy of the shipped needle model by length and depth: n haystacks each, those of a length side by side."""
    model = load_needle_models()["memory"]
    file = out / "needles.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for length in lengths:
        left = [
            d for d in depths if not any((r["length"], r["depth"], r["n"]) == (length, d, n) for r in rows)
        ]
        if left:
            right = found(model, [NeedleTask(length, depth=d) for d in left for _ in range(n)])
            parts = np.array(right).reshape(len(left), n)
            rows += [
                {"length": length, "depth": d, "n": n, "correct": int(part.sum())}
                for d, part in zip(left, parts, strict=True)
            ]
            write_atomically(file, (json.dumps(rows, indent=1) + "\n").encode())
        mine = [r for r in rows if r["length"] == length and r["n"] == n]
        correct, count = sum(r["correct"] for r in mine), n * len(mine)
        low, high = wilson(correct, count)
        print(
            f"{length:,} bytes: {correct} of {count} found [{low:.0%}, {high:.0%}], by depth {mine}",
            flush=True,
        )


def found(model: LM, tasks: list[NeedleTask]) -> list[bool]:
    """Whether all digits of each haystack's answer are the model's first choice (as `needle_accuracy` scores)."""
    tokens = np.stack([task.sample(20_261, index).tokens for index, task in enumerate(tasks)])
    answer = tasks[0].length - tasks[0].digits
    right = np.ones(len(tasks), dtype=np.bool_)
    for part in read_pieces(model, tokens, piece=PIECE):
        asked = slice(max(0, answer - part.start), None)
        right &= (part.predicted[:, asked] == part.tokens[:, asked]).all(1)
    return right.tolist()


def plot(out: Path, picture: Path) -> None:
    """Memory, time, loss and |W| along the stream."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 5.4), constrained_layout=True)
    for name, colour in zip(MODELS, ("#2a6f97", "#bc4b51"), strict=True):
        rows = json.loads((out / f"{name}.json").read_text())
        at = [r["tokens"] / 1e6 for r in rows]
        axes[0, 0].plot(at, [r["peak_mb"] for r in rows], color=colour, label=name)
        axes[0, 1].plot(at, [r["cpu_us_per_token"] for r in rows], color=colour, lw=0.8)
        axes[1, 0].plot(at, [r["bits_per_byte"] for r in rows], color=colour, lw=0.8)
        layers = [k for k in rows[0] if k.startswith("layers")]
        for layer, style in zip(layers, ("-", "--"), strict=False):
            axes[1, 1].plot(at, [r[layer]["weight"] for r in rows], color=colour, ls=style, lw=0.8)
    titles = (
        "peak memory, MB",
        "CPU time per token, us",
        "bits per byte",
        "|W|, first layer solid, second dashed",
    )
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    for axis in axes[1]:
        axis.set_xlabel("million tokens read")
    axes[0, 0].legend(frameon=False, loc="lower right")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parts = ("train", "read", "pace", "needles", "plot")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--out", type=Path, default=Path("runs/endless"))
    parser.add_argument("--tokens", type=int, default=100 * ROW, help=f"bytes to read, a multiple of {ROW}")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--rounds", type=int, default=15, help="of alternating blocks")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="to read with")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--depths", type=float, nargs="*", default=[0.01, 0.25, 0.5, 0.75, 0.99])
    parser.add_argument("--samples", type=int, default=2, help="needles at each length and depth")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/endless.png"))
    parser.add_argument("--read", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens < ROW or options.tokens % ROW:
        parser.error(f"--tokens must be a multiple of {ROW}, got {options.tokens}")
    torch.set_num_threads(1)
    out = options.out
    if options.read:
        read(out, options.read, options.tokens)
        return
    if "train" in options.only:
        train(out, options.steps)
    for name in options.models if "read" in options.only else ():
        command = [
            sys.executable,
            __file__,
            "--read",
            name,
            "--out",
            str(out),
            "--tokens",
            str(options.tokens),
        ]
        subprocess.run(command, check=True, env=os.environ | MALLOC)
    if "pace" in options.only:
        pace(out, options.tokens, options.rounds)
    if "needles" in options.only:
        needles(out, options.lengths, options.depths, options.samples)
    if "plot" in options.only:
        plot(out, options.picture)


if __name__ == "__main__":
    main()
