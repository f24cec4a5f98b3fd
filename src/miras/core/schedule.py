"""Axis 5, when: which tokens update the accumulator, and which weights a token reads."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from miras.core.typed import Typed, overridden

UPDATES = ("token", "chunk")
READS = ("after", "before", "start")


@dataclass(frozen=True)
class Schedule(Typed):
    """When a memory is updated and read.

    update "token": S_t and A_t change with every token (Titans, MIRAS). "chunk": the accumulator is
    updated with the sum of a chunk's steps after its last token (LaCT, In-Place TTT),

        S_t = S_{t-1} - lr_t grad_t
        A = advance(A, product of 1 - forget, direction(S)),   S = 0

    read "after" the token's own write, "before" it, or at the chunk's "start". The steps of a chunk
    that is open at a document's end are never applied. Raises ValueError for any other value.
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
        """Whether the steps of several tokens are summed before the accumulator is updated."""
        return self.update == "chunk"

    @property
    def form(self) -> frozenset[str]:
        """What a path that runs it must support: the method below if it overrides it, and
        options."""
        options = {"update by chunk": self.gathers, f"read {self.read}": self.read != "after"}
        return overridden(self, Schedule, ("due",)) | {name for name, there in options.items() if there}

    def due(self, place: Tensor, size: int) -> Tensor:
        """The rows (B,) whose accumulator is updated after the token at this place of its chunk."""
        return place == size - 1

    def refusal(self, rule: Any) -> str | None:
        """Why this schedule is not supported in a rule, or None."""
        if self.gathers and rule.algorithm.momentum:
            return (
                "momentum changes S with every token, but update='chunk' uses the sum of a chunk's steps: use "
                "momentum=False or update='token'"
            )
        return None


SCHEDULES = (Schedule,)
