"""Axis 5, when: which tokens move the accumulator, and which weights a token reads."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from miras.core.typed import Typed, overridden

UPDATES = ("token", "chunk")
READS = ("after", "before", "start")


@dataclass(frozen=True)
class Schedule(Typed):
    """When a memory is updated and read.

    update "token": S_t and A_t move with every token (Titans, MIRAS). "chunk": the steps of a chunk add up, and the
    accumulator takes their sum behind its last token (LaCT, In-Place TTT),

        S_t = S_{t-1} - lr_t grad_t,   A = advance(A, the product of 1 - forget, direction(S)),   S = 0

    read "after" the token's own write, "before" it, or at the chunk's "start". A chunk that a document's end leaves
    open is never taken. Raises ValueError for another word.
    """

    update: Literal["token", "chunk"] = "token"
    read: Literal["after", "before", "start"] = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("update", UPDATES), ("read", READS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Schedule: {name} must be one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}"
                )

    @property
    def gathers(self) -> bool:
        """Whether the steps of several tokens add up before the accumulator takes them."""
        return self.update == "chunk"

    @property
    def form(self) -> frozenset[str]:
        """What there is about it that a way to run it must know: the method below if it is its own, and options."""
        options = {"update by chunk": self.gathers, f"read {self.read}": self.read != "after"}
        return overridden(self, Schedule, ("due",)) | {name for name, there in options.items() if there}

    def due(self, place: Tensor, size: int) -> Tensor:
        """The rows (B,) whose accumulator takes what was gathered, behind the token at this place of its chunk."""
        return place == size - 1

    def refusal(self, rule: Any) -> str | None:
        """Why this schedule has no meaning in a rule, or None."""
        if self.gathers and rule.algorithm.momentum:
            return (
                "momentum moves S with every token, and update='chunk' takes the sum of a chunk's steps: use "
                "momentum=False or update='token'"
            )
        return None


SCHEDULES = (Schedule,)
