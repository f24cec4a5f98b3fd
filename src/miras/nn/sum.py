"""Mixers side by side: all read the same x, and their outputs are added."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from miras.core.state import Record
from miras.engine.plan import Plan
from miras.nn.memory import memories_in
from miras.nn.mixer import Mixer
from miras.nn.part import MixerConfig, Sizes


@dataclass(frozen=True, kw_only=True)
class SumConfig(MixerConfig):
    """Several mixers in one layer, such as memories with rules of their own: a `Sum`."""

    name: ClassVar[str] = "sum"

    mixers: tuple[MixerConfig, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.mixers, tuple) or len(self.parts()) != len(self.mixers):  # pyright: ignore
            raise ValueError(f"SumConfig: mixers must be a tuple of mixers, got {self.mixers!r}")

    def build(self, sizes: Sizes) -> "Sum":
        return Sum(sizes, self)

    def refusal(self, sizes: Sizes) -> str | None:
        if not self.mixers:
            return "a sum needs mixers, such as SumConfig(mixers=(MemoryConfig(), AttentionConfig()))"
        return super().refusal(sizes)

    def flops(self, sizes: Sizes) -> int:
        return sum(part.flops(sizes) for part in self.mixers)


@dataclass(frozen=True)
class SumState(Record):
    """The state of each mixer, in their order."""

    parts: tuple[Any, ...]


class Sum(Mixer):
    """y = mixer_1(x) + ... + mixer_n(x). In observations its memories are called layer, layer.1,
    layer.2 and so on."""

    def __init__(self, sizes: Sizes, config: SumConfig) -> None:
        super().__init__()
        self.hidden_size = sizes.hidden_size
        self.mixers = nn.ModuleList(part.build(sizes) for part in config.mixers)
        counts = [len(memories_in(part)) for part in config.mixers]
        self.before = [sum(counts[:i]) for i in range(len(counts))]
        """The number of memories before each mixer."""

    def outputs(self) -> list[Tensor]:
        return [weight for mixer in self.each() for weight in mixer.outputs()]

    def initial(self, rows: int, like: Tensor) -> SumState:
        return SumState(tuple(mixer.initial(rows, like) for mixer in self.each()))

    def place(self, state: SumState) -> list[int]:
        found = [mixer.place(part) for mixer, part in zip(self.each(), state.parts, strict=True)]
        return [max(row) for row in zip(*filter(None, found), strict=True)]

    def fits(self, state: SumState, rows: int) -> None:
        for mixer, part in zip(self.each(), state.parts, strict=True):
            mixer.fits(part, rows)

    def prepare(self, plan: Plan) -> None:
        for mixer in self.each():
            mixer.prepare(plan)

    def one_graph(self, plan: Plan) -> bool:
        return all(mixer.one_graph(plan) for mixer in self.each())

    def mix(self, x: Tensor, state: SumState, plan: Plan) -> tuple[Tensor, SumState]:
        name = "" if plan.watch is None else plan.watch.layer
        total, after = None, list[Any]()
        for mixer, part, before in zip(self.each(), state.parts, self.before, strict=True):
            y, part = mixer.mix(x, part, plan.watched(f"{name}.{before}") if before else plan)
            total = y if total is None else total + y
            after.append(part)
        assert total is not None
        return total, SumState(tuple(after))

    def each(self) -> list[Mixer]:
        """The mixers, in their order."""
        return list(self.mixers)  # pyright: ignore
