"""The memory layer's speed and memory beside titans-pytorch: forward and backward, one process for each case.

    pip install -e ".[bench]"
    python benchmarks/layer.py

Batch 1, 4096 tokens, width 256, 4 heads of 64, a two-layer memory with expansion 4 and momentum, fp32. By default
titans-pytorch takes its gradients at the initial memory; with batch_size = chunk they follow the memory, as ours
do. It reads each chunk with the weights from before it, ours with those of every token.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median

import torch

CASES = [
    (who, chunk)
    for chunk in (16, 64)
    for who in ("miras", "titans-pytorch", "titans-pytorch, batch_size=chunk")
]
TOKENS, WIDTH, HEADS = 4096, 256, 4


def build(who: str, chunk: int) -> torch.nn.Module:
    """The layer of a case."""
    if who == "miras":
        from miras.core.algorithm import GradientDescent
        from miras.core.memory import MLP
        from miras.core.rule import Rule
        from miras.nn.memory import MemoryLayer

        rule = Rule(MLP(), algorithm=GradientDescent(momentum=True, step_bound=10.0), chunk_size=chunk)
        return MemoryLayer(WIDTH, HEADS, rule)
    from titans_pytorch import MemoryMLP, NeuralMemory  # pyright: ignore[reportMissingImports]

    layer = NeuralMemory(
        dim=WIDTH,
        dim_head=WIDTH // HEADS,
        heads=HEADS,
        chunk_size=chunk,
        batch_size=chunk if "batch_size" in who else None,
        model=MemoryMLP(WIDTH // HEADS, depth=2, expansion_factor=4.0),
        qk_rmsnorm=True,
        momentum=True,
    )
    for p in layer.parameters():  # several of its parameters are expanded views
        p.data = p.data.contiguous().clone()
    return layer


def run(who: str, chunk: int, rounds: int) -> None:
    """Print the median seconds of a forward and backward pass, and this process's peak memory in MB."""
    torch.empty(7 << 20)  # glibc keeps freed memory once it has met a large piece, as in any larger program
    torch.manual_seed(0)
    layer = build(who, chunk)
    x = torch.randn(1, TOKENS, WIDTH)
    times: list[float] = []

    def once() -> float:  # a function, so that one round's results are gone before the next
        layer.zero_grad(set_to_none=True)
        began = time.perf_counter()
        y, _ = layer(x)
        y.square().mean().backward()
        return time.perf_counter() - began

    times += [once() for _ in range(rounds + 1)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": median(times[1:]), "peak_mb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        run(options.case[0], int(options.case[1]), options.rounds)
        return
    print(f"torch {torch.__version__}, {options.threads} threads, median of {options.rounds}")
    for who, chunk in CASES:
        command = [sys.executable, __file__, "--case", who, str(chunk), "--rounds", str(options.rounds)]
        command += ["--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"chunk {chunk:3} {who:34} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        told = json.loads(done.stdout.strip().splitlines()[-1])
        speed = TOKENS / told["seconds"]
        print(f"chunk {chunk:3} {who:34} {speed:8,.0f} tokens/s  peak {told['peak_mb']:6,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
