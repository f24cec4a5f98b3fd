"""Constant memory and constant cost: a stream of a million bytes against one of fifty thousand.

    python benchmarks/streaming.py

Peak memory is that of a fresh process for each length, with fixed malloc thresholds. Time per token is measured in
one process, in blocks that alternate between the two saved states.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

from miras.demo.needle import load
from miras.nn.lm import LM
from miras.nn.reading import read_pieces
from miras.stream.files import load_state, save_state

LENGTHS = (50_000, 1_000_000)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""Left to itself, glibc moves its thresholds while it runs, and the heap's shape with them: 10 MB either way."""


def blocks(length: int, size: int = 8192) -> Iterator[np.ndarray]:
    """Random bytes, never all at once."""
    rng = np.random.default_rng(0)
    for at in range(0, length, size):
        yield rng.integers(32, 127, min(size, length - at), dtype=np.uint8)


def read(model: LM, length: int, path: Path) -> None:
    """Read a stream, save its state and print the peak memory of this process in MB."""
    for part in read_pieces(model, blocks(length)):
        state = part.state
    save_state(path, state, model)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3))


def measure(folder: Path, rounds: int) -> dict[str, dict[int, float]]:
    """Peak memory (MB), and microseconds per token of prefill blocks and of decoding, by length."""
    peak: dict[int, float] = {}
    for length in LENGTHS:
        command = [sys.executable, __file__, "--read", str(length), "--folder", str(folder)]
        told = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | MALLOC
        ).stdout
        peak[length] = json.loads(told)
    model = load()["memory"]
    states = {n: load_state(folder / f"{n}.safetensors", model)[0] for n in LENGTHS}
    block = next(blocks(4096))
    tokens = torch.from_numpy(block[:256].astype(np.int64))[None]
    prefill: dict[int, list[float]] = {n: [] for n in LENGTHS}
    decode: dict[int, list[float]] = {n: [] for n in LENGTHS}
    for _ in range(rounds):
        for n in LENGTHS:
            began = time.perf_counter()
            for _ in read_pieces(model, block, states[n]):
                pass
            prefill[n].append((time.perf_counter() - began) / len(block) * 1e6)
            began, state = time.perf_counter(), states[n]
            with torch.no_grad():
                for t in range(tokens.shape[1]):
                    _, state = model(tokens[:, t : t + 1], state)
            decode[n].append((time.perf_counter() - began) / tokens.shape[1] * 1e6)
    medians = {
        name: {n: median(x) for n, x in times.items()}
        for name, times in (("prefill", prefill), ("decode", decode))
    }
    return {"peak_mb": peak, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--read", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.read is not None:
        read(load()["memory"], options.read, options.folder / f"{options.read}.safetensors")
        return
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), options.rounds)
    if options.json:
        print(json.dumps(measured))
        return
    for name, unit in (("peak_mb", "MB"), ("prefill", "us per token"), ("decode", "us per token")):
        few, many = (measured[name][n] for n in LENGTHS)
        print(f"{name:8} after {LENGTHS[0]:,} bytes {few:,.1f} {unit},", end=" ")
        print(f"after {LENGTHS[1]:,} {many:,.1f} ({many / few - 1:+.1%})")


if __name__ == "__main__":
    main()
