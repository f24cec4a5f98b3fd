"""One observed reading of a text: how much every token surprised the model, and what its memories
did."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from miras.core.observe import Observation
from miras.data.text import NUL
from miras.data.tokens import Tokenizer
from miras.nn.lm import LM, LMState
from miras.nn.memory import memories_in
from miras.nn.reading import Spelling
from miras.report.explorer import Watched
from miras.stream.run import read

STRANGE = 0.1
"""The largest fraction of characters in a text that may be invalid UTF-8."""


def watch(
    model: LM,
    tokenizer: Tokenizer,
    ids: NDArray[np.int64],
    state: LMState | None = None,
    *,
    layers: Sequence[int] = (),
    piece: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Watched:
    """Read ids (T,) once, after `state`, and record what the memories of `layers` did (all by
    default).

    Raises ValueError before reading if a layer has no memory, there are no tokens, or the state has
    several streams.
    """
    check_layers(model, layers)
    if not len(ids):
        raise ValueError("there are no tokens to read")
    if state is not None and len(state.tokens) != 1:
        raise ValueError(f"the state holds {len(state.tokens)} streams; a page shows only one")
    before = 0 if state is None else int(state.tokens[0])
    found = read(model, ids, state, piece=piece, progress=progress, observe=True)
    assert found.seen is not None
    memories = memories_of(found.seen)
    return Watched(
        pieces=spelled(tokenizer, ids),
        bits=found.losses[0] / np.log(2),
        memories={n: memories[n] for n in (sorted(set(layers)) or memories)},
        before=before,
    )


def check_layers(model: LM, layers: Sequence[int]) -> None:
    """Raise ValueError if one of the layers has no memory."""
    config = model.config
    there = [n for n, mixer in enumerate(config.mixers()) if memories_in(mixer)]
    if wrong := [n for n in layers if n not in there]:
        having = f"layers with a memory: {', '.join(map(str, there))}" if there else "the model has no memory"
        raise ValueError(f"--layers {wrong[0]}: no such memory layer; {having}")


def memories_of(seen: Observation) -> dict[int, dict[str, NDArray[np.float32]]]:
    """The observation as {layer number: {name: (H, T)}}; gates per weight are averaged.

    Without momentum nothing accumulates: |S| would be the momentary surprise times the step. If a
    layer has several memories it is the first.
    """
    found: dict[int, dict[str, NDArray[np.float32]]] = {}
    for layer in seen.layers():
        groups: dict[str, list[NDArray[np.float32]]] = {}
        for name, values in seen[layer].items():
            groups.setdefault(name.split(".")[0], []).append(values[0].float().cpu().numpy())
        if "momentum" not in groups:
            del groups["accumulated"]
        means = {name: np.mean(each, axis=0) for name, each in groups.items()}
        found.setdefault(int(layer.split(".")[1]), means)
    return found


def spelled(tokenizer: Tokenizer, ids: NDArray[np.int64]) -> list[str]:
    """The text that each token completes, "" for an incomplete character."""
    spelling = Spelling(tokenizer.decode)
    pieces = [spelling.push(ids[t : t + 1]) for t in range(len(ids))]
    if pieces:
        pieces[-1] += spelling.rest()
    return pieces


def first_tokens(blocks: Iterable[NDArray[np.int64]], count: int) -> tuple[NDArray[np.int64], bool]:
    """The first `count` tokens of a stream (0: all), and whether there are more."""
    parts: list[NDArray[np.int64]] = []
    have = 0
    for block in blocks:
        parts.append(block)
        have += len(block)
        if count and have > count:
            break
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return (ids[:count], have > count) if count else (ids, False)


def as_text(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The blocks of a file, unchanged. Raises ValueError if they cannot be shown as text."""
    first = next(blocks, b"")
    shown = first.decode("utf-8", errors="replace")
    if not first:
        raise ValueError(f"{name} is empty: nothing to read")
    if shown.count("\ufffd") > STRANGE * len(shown):
        raise ValueError(
            f"{name} is not text: much of it is not UTF-8. Save it as UTF-8, or name a text file"
        )
    for block in chain([first], blocks):
        if b"\0" in block:
            raise ValueError(f"{name} is not text: {NUL}")
        yield block
