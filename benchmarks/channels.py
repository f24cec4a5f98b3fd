"""What gates by channel cost in training: yaad, moneta and memora beside themselves with gates per head.

    python benchmarks/channels.py

Forward and backward pass of 4096 tokens through one layer of width 128, fp32, one thread: medians of interleaved
passes, in seconds of processor time, so that other programs on the machine count less. Heads of 64 as at the
presets' own sizes, and of 32. Moneta's and Memora's weights are a map of what is accumulated and have to be formed
whatever the gates are; the last column is beside yaad with gates per head, which forms none.
"""

import argparse
import dataclasses
import time
from statistics import median

import torch

from miras.nn.lm import LM
from miras.zoo import override, preset

PRESETS = ("yaad", "moneta", "memora")


def build(name: str, heads: int, by_channel: bool) -> LM:
    """A preset's model, its gates as they are or one for each head and weight."""
    config = preset(name, vocab_size=256, hidden_size=128, num_heads=heads, num_hidden_layers=1)
    if not by_channel:
        gates = config.memories()[0].gates
        gates = {n: dataclasses.replace(gate, channels=None) for n, gate in gates.items()}
        config = override(config, gates=gates)
    torch.manual_seed(0)
    return LM(config)


def seconds(model: LM, tokens: torch.Tensor) -> float:
    """Of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    logits, _ = model(tokens)
    logits.square().mean().backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", nargs="+", type=int, default=(2, 4))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokens = torch.randint(256, (1, options.tokens))
    print(f"torch {torch.__version__}, {options.tokens} tokens, medians of {options.rounds}\n", flush=True)
    print("| preset | heads | per head, s | by channel, s | ratio | beside yaad per head |")
    print("|---|---:|---:|---:|---:|---:|")
    for heads in options.heads:
        models = {(name, by): build(name, heads, by) for name in PRESETS for by in (False, True)}
        rounds = [[seconds(m, tokens) for m in models.values()] for _ in range(options.rounds + 1)]
        took = {case: median(times) for case, *times in zip(models, *rounds[1:], strict=True)}
        for name in PRESETS:
            head, channel = took[name, False], took[name, True]
            ratios = f"{channel / head:.2f} | {channel / took['yaad', False]:.2f}"
            print(f"| {name} | {heads} | {head:.2f} | {channel:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
