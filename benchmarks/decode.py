"""One token at a time: titans-mac and titans-mag beside titans-pytorch's MAC with its cache, the same sizes, one run.

    pip install -e ".[bench]"
    python benchmarks/decode.py

Batch 1, width 256, 4 layers, 4 heads of 64, a two-layer memory with expansion 4 and momentum, memory chunks of 64,
segments (MAG: a window) of 128, 4 persistent tokens, fp32, random weights. titans-pytorch also has 16 long-term
tokens for each segment, which cost it a step each; its memory is read and written in every layer, as ours is. The
models take turns, a segment of 128 tokens each, and a token's time is the median over the turns of their mean: what
happens once in a segment is in it. Ours run as they are and as `miras.Compiled`, which needs a C++ compiler; the
first turn warms up, compiling included, and does not count. State counts the storage that what is handed on keeps
alive.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

import miras

WIDTH, LAYERS, HEADS, CHUNK, SEGMENT, PERSISTENT, LONG_TERM = 256, 4, 4, 64, 128, 4, 16
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_heads": HEADS,
    "chunk_size": CHUNK,
    "num_persistent": PERSISTENT,
}


class Ours:
    """A preset of the sizes above, its single tokens as one compiled graph or not."""

    def __init__(self, name: str, compiled: bool, **sizes: Any) -> None:
        self.name = name + (", compiled" if compiled else "")
        self.model = miras.LM(miras.preset(name).changed(SIZES | sizes)).eval()
        self.call = miras.Compiled(self.model) if compiled else self.model
        self.state: Any = None

    def read(self, prompt: Tensor, more: int) -> None:
        _, self.state = self.model(prompt)

    def step(self, token: Tensor) -> None:
        _, self.state = self.call(token, self.state)


class Theirs:
    """titans-pytorch's MAC, driven as its `sample(use_cache=True)` does."""

    name = "titans-pytorch"

    def __init__(self) -> None:
        from titans_pytorch import MemoryAsContextTransformer, MemoryMLP  # pyright: ignore

        self.model = MemoryAsContextTransformer(
            num_tokens=256,
            dim=WIDTH,
            depth=LAYERS,
            heads=HEADS,
            dim_head=WIDTH // HEADS,
            segment_len=SEGMENT,
            num_persist_mem_tokens=PERSISTENT,
            num_longterm_mem_tokens=LONG_TERM,
            neural_memory_segment_len=CHUNK,
            neural_memory_model=MemoryMLP(WIDTH // HEADS, depth=2, expansion_factor=4.0),
            neural_memory_kwargs={"dim_head": WIDTH // HEADS, "heads": HEADS, "qk_rmsnorm": True},
        ).eval()
        self.state: Any = None

    def read(self, prompt: Tensor, more: int) -> None:
        length = self.model.seq_len_with_longterm_mem(prompt.shape[1] + more)
        dims = self.model.axial_pos_emb.maybe_derive_outer_dim(length, (CHUNK,))
        self.places = self.model.axial_pos_emb(dims, return_factorized=True)
        self.text, self.state = prompt, None
        self._call()

    def step(self, token: Tensor) -> None:
        self.text = torch.cat([self.text, token], 1)
        while self._call() is None:  # a long-term token
            pass

    def _call(self) -> Tensor | None:
        logits, self.state = self.model(
            self.text, cache=self.state, return_cache=True, factorized_pos_emb=self.places
        )
        return logits


def kept(state: Any) -> int:
    """Bytes of the storages that a state keeps alive."""
    return sum({s.data_ptr(): s.nbytes() for s in storages(state)}.values())


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif hasattr(value, "tensors"):
        yield from storages(list(value.tensors().values()))
    elif hasattr(value, "values"):
        yield from storages(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from storages(part)


def timed(fn: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and CPU seconds of a call."""
    began, cpu = time.perf_counter(), time.process_time()
    fn()
    return time.perf_counter() - began, time.process_time() - cpu


@torch.no_grad()
def run(models: list[Any], prompt: Tensor, turns: int) -> None:
    """Print a row for each model: its prompt, then `turns` segments of single tokens."""
    tokens = torch.randint(256, (1, SEGMENT))
    read: dict[str, float] = {}
    after: dict[str, int] = {}
    times: dict[str, list[tuple[float, float]]] = {each.name: [] for each in models}
    for each in models:
        read[each.name], _ = timed(lambda each=each: each.read(prompt, (turns + 1) * SEGMENT))
        after[each.name] = kept(each.state)

    def segment(model: Any) -> None:
        for t in range(SEGMENT):
            model.step(tokens[:, t : t + 1])

    for turn in range(turns + 1):
        for each in models:
            took = timed(lambda each=each: segment(each))
            times[each.name] += [took] * (turn > 0)  # the first turn warms up
    for each in models:
        wall, cpu = (1e3 * median(column) / SEGMENT for column in zip(*times[each.name], strict=True))
        size = sum(p.numel() for p in each.model.parameters()) / 1e6
        print(
            f"{each.name:20} {size:5.1f} M {prompt.shape[1]:6} {prompt.shape[1] / read[each.name]:9,.0f} "
            f"{after[each.name] / 1e6:10.1f} {kept(each.state) / 1e6:9.1f} {wall:9.2f} {cpu:9.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    models: list[Any] = [Theirs()]
    for compiled in (False, True)[: 1 + options.compile]:
        models.append(Ours("titans-mac", compiled, segment_size=SEGMENT))
        models.append(Ours("titans-mag", compiled, window_size=SEGMENT))
    print(f"torch {torch.__version__}, {options.threads} threads, median of {options.turns} turns")
    print(
        f"{'':20} {'size':>7} {'prompt':>6} {'tokens/s':>9} {'MB after':>10} {'MB later':>9} {'ms/token':>9} "
        f"{'CPU ms':>9}"
    )
    for length in options.prompts:
        run(models, torch.randint(256, (1, length)), options.turns)


if __name__ == "__main__":
    main()
