"""The memories of a session, the distance between two sessions, and what is left of each
episode."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.nn import Module

from miras.core.observe import observe
from miras.core.rule import State
from miras.core.state import Record, Tree
from miras.data.novel import load_novel
from miras.data.tokens import Tokenizer
from miras.nn.folder import weights
from miras.nn.lm import LM, LMState
from miras.nn.memory import MemoryReader
from miras.session.moment import Ids, Moment, mean
from miras.stream.run import read


def memories(model: LM, state: LMState) -> dict[str, Tree]:
    """The weights W of each layer's memory, {layer: {weight: (B, H, d_in, d_out)}}; empty for
    attention alone.

    If a layer has several memories, the second is called layer.1 and so on, as in observations.
    """
    return {
        f"layers.{number}{f'.{i}' if i else ''}": {n: w.detach() for n, w in reader.weights(found).items()}
        for number, (block, part) in enumerate(zip(model.model.layers, state.layers, strict=True))
        for i, (reader, found) in enumerate(zip(_readers(block), _states(part), strict=True))
    }


def _readers(block: Module) -> list[MemoryReader]:
    return [module for module in block.modules() if isinstance(module, MemoryReader)]


def _states(value: Any) -> Iterator[State]:
    """The memory states in a layer's state, for any mixer."""
    if isinstance(value, State):
        yield value
    elif isinstance(value, Record):
        for field in fields(value):
            yield from _states(getattr(value, field.name))
    elif isinstance(value, tuple):
        for each in cast(tuple[Any, ...], value):
            yield from _states(each)


@dataclass(frozen=True)
class Moved:
    """The distance between one weight of one layer's memory in two states.

    size: |W| before, over all heads; distance: |W' - W|; heads: each head's distance relative to
    its own size.
    """

    layer: str
    weight: str
    size: float
    distance: float
    heads: tuple[float, ...]

    @property
    def share(self) -> float:
        """The distance relative to the size."""
        return _share(self.distance, self.size)


def moved(model: LM, before: LMState, after: LMState) -> list[Moved]:
    """The distance of each weight of each layer's memory between two states, in Frobenius norms."""
    there, here = memories(model, before), memories(model, after)
    return [
        _moved(layer, name, w[0], here[layer][name][0])
        for layer, tree in there.items()
        for name, w in tree.items()
    ]


def _moved(layer: str, name: str, before: Tensor, after: Tensor) -> Moved:
    """Weights (H, d_in, d_out) before and after."""
    sizes = before.double().flatten(1).norm(dim=1)
    distances = (after.double() - before.double()).flatten(1).norm(dim=1)
    heads = tuple(_share(float(d), float(s)) for d, s in zip(distances, sizes, strict=True))
    return Moved(layer, name, float(sizes.norm()), float(distances.norm()), heads)


def _share(distance: float, size: float) -> float:
    if distance == 0:
        return 0.0
    return distance / size if size else float("inf")


def outer_distance(before: LM, after: LM) -> float:
    """The distance between the outer weights of two models, relative to the norm of the first."""
    there, here = weights(before), weights(after)
    size = sum(float(x.double().square().sum()) for x in there.values()) ** 0.5
    return sum(float((here[n].double() - x.double()).square().sum()) for n, x in there.items()) ** 0.5 / size


@dataclass(frozen=True)
class Recalled:
    """What is left of an episode: mean losses in nats on its kept tokens, read without writing.

    now: with the current memory; after: with the memory right after reading it (measured then, with
    the weights of then); fresh: with a memory that has read nothing; other: the control, with a
    memory that has read as much of another text (pages of the embedded novel that the episode is
    not from, at most `CONTROL` tokens); base: fresh, with the base model's weights, if weights have
    learned.
    Attention windows are part of the state. None if nothing was measured.
    """

    name: str
    time: str
    tokens: int
    kept: int
    now: float | None
    after: float | None
    fresh: float | None
    other: float | None
    base: float | None

    @property
    def left(self) -> float | None:
        """What the memory contributes to this text beyond what any English text would have taught
        it: other - now."""
        return None if self.other is None or self.now is None else self.other - self.now


CONTROL = 8192
"""The most tokens of another text that the control reads."""


def recalled(base: LM, model: LM, moment: Moment, tokenizer: Tokenizer) -> list[Recalled]:
    """What is left of each episode at a moment; `model` is the base model plus what was learned."""
    control = _Control(model, tokenizer, min(CONTROL, moment.tokens))
    return [
        Recalled(
            name=episode.name,
            time=episode.time,
            tokens=episode.tokens,
            kept=len(episode.kept),
            now=loss_of(model, episode.kept, moment.state),
            after=episode.after,
            fresh=loss_of(model, episode.kept, None),
            other=loss_of(model, episode.kept, control.state(episode.kept)),
            base=loss_of(base, episode.kept, None) if moment.delta else None,
        )
        for episode in moment.episodes
    ]


class _Control:
    """The states of fresh memories that have read another text of that many tokens."""

    def __init__(self, model: LM, tokenizer: Tokenizer, length: int) -> None:
        novel = load_novel()
        self.model, self.tokenizer, self.length = model, tokenizer, length
        self.texts = (novel.train, novel.heldout)
        self.states: dict[int, LMState] = {}

    def state(self, kept: Ids) -> LMState | None:
        """The state that has read pages without this text; None for no text."""
        if not len(kept):
            return None
        begin = self.tokenizer.decode(kept[:200].astype(np.int64)).rstrip("\ufffd").encode()
        which = 1 if begin in self.texts[0] else 0
        if which not in self.states:
            ids = self.tokenizer.encode(self.texts[which][: 16 * self.length])[: self.length]
            with observe(False):
                self.states[which] = read(self.model, ids).state
        return self.states[which]


def loss_of(model: LM, ids: Ids, state: LMState | None) -> float | None:
    """Mean loss in nats of tokens (T,) read after a state without writing, not counting the first.

    A fresh stream does not predict it, so it is left out everywhere. None for fewer than two
    tokens.
    """
    with observe(False):
        return mean(read(model, ids, state, write=False).losses[0, 1:])
