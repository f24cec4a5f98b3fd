"""What the host decides about a call, once for all layers: which tokens exist, where chunks and
documents begin.

Layers take everything that depends on values from the plan, so nothing below it synchronises with
the host. In its order padding is at the end of rows.

Shapes: B rows, T tokens, n tokens of a part, N chunks of C tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.observe import Watch

Made = TypeVar("Made")


@dataclass(eq=False)  # not frozen: graphs treat classes other than frozen dataclasses as constants
class Plan:
    """A call of T tokens, with padding at the end of rows.

    place: tokens that each row had read of its open document. length (B,) tokens of each row, None
    for all; write, reset (B, T) bool in that order, None for all and none; order (B, T) int64 where
    the tokens were before, None if nothing moved. lengths and begins are `length`, and where
    documents begin in each row, as the host knows them; holes (B, T) which tokens exist where rows
    are not filled from the front.
    device: the layers' own. watch: where what a layer does
    is recorded.
    """

    device: torch.device
    tokens: int
    place: tuple[int, ...]
    lengths: tuple[int, ...]
    begins: tuple[tuple[int, ...], ...]
    length: Tensor | None = None
    write: Tensor | None = None
    reset: Tensor | None = None
    order: Tensor | None = None
    holes: Tensor | None = None
    watch: Watch | None = None
    made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def valid(self) -> Tensor | None:
        """The tokens that exist, (B, T) bool, or None for all."""
        if self.length is None:
            return None
        return torch.arange(self.tokens, device=self.length.device) < self.length[:, None]

    def gather(self, x: Tensor) -> Tensor:
        """x (B, T, ...) with every row's tokens moved to the front, followed by 0."""
        valid = self.valid()
        if valid is None:
            return x
        wide = (..., *[None] * (x.dim() - 2))
        if self.order is not None:
            x = x.gather(1, self.order[wide].expand(x.shape))
        return x.masked_fill(~valid[wide], 0)

    def scatter(self, y: Tensor) -> Tensor:
        """The inverse of `gather`, with 0 at padding tokens."""
        valid = self.valid()
        if valid is None:
            return y
        wide = (..., *[None] * (y.dim() - 2))
        y = torch.where(valid[wide], y, torch.zeros_like(y))
        if self.order is None:
            return y
        return torch.zeros_like(y).scatter(1, self.order[wide].expand(y.shape), y)

    def after(self) -> tuple[int, ...]:
        """Tokens that each row has read of its open document after the call."""
        rows = zip(self.place, self.lengths, self.begins, strict=True)
        return tuple(n - begins[-1] if begins else place + n for place, n, begins in rows)

    def bare(self) -> bool:
        """Whether it holds no tensors and is not observed: then it is fully known to the host."""
        held = (self.length, self.write, self.reset, self.order, self.holes, self.watch)
        return all(x is None for x in held)

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Plan):
            return self is other
        return self.bare() and other.bare() and self._known() == other._known()

    def __hash__(self) -> int:
        return hash(self._known())

    def _known(self) -> tuple[Any, ...]:
        return (self.device, self.tokens, self.place, self.lengths, self.begins)

    def even(self) -> bool:
        """Whether all rows have all tokens, and none of them begins a document."""
        return self.length is None and not any(self.begins)

    def chunks(self, size: int) -> "Even | Grid":
        """The layout of tokens on chunks of `size` tokens, counted from the beginning of each
        document."""
        return self._once(("chunks", size), lambda: _laid(self, size, [p % size for p in self.place]))

    def blocks(self, size: int) -> "Even | Grid":
        """The same for blocks of a computation, counted from the beginning of the call."""
        return self._once(("blocks", size), lambda: _laid(self, size, [0] * len(self.place)))

    def segments(self, size: int) -> "tuple[Part, ...]":
        """The call split at the ends of segments of `size` tokens; documents begin new segments."""
        return self._once(("segments", size), lambda: _segments(self, size))

    def steps(self, n: int) -> "Plan":
        """The plan of the same call with every token repeated n times."""
        return self if n == 1 else self._once(("steps", n), lambda: self._times(n))

    def watched(self, layer: str) -> "Plan":
        """The plan for a layer of that name."""
        return self if self.watch is None else replace(self, watch=self.watch._replace(layer=layer))

    def _times(self, n: int) -> "Plan":
        reset = self.reset
        if reset is not None:
            first = torch.arange(self.tokens * n, device=reset.device) % n == 0
            reset = reset.repeat_interleave(n, 1) & first
        return Plan(
            device=self.device,
            tokens=self.tokens * n,
            place=tuple(p * n for p in self.place),
            lengths=tuple(x * n for x in self.lengths),
            begins=tuple(tuple(t * n for t in row) for row in self.begins),
            length=None if self.length is None else self.length * n,
            write=None if self.write is None else self.write.repeat_interleave(n, 1),
            reset=reset,
            holes=None if self.holes is None else self.holes.repeat_interleave(n, 1),
        )

    def _once(self, key: tuple[str, int], make: Callable[[], Made]) -> Made:
        """Computed by the first layer that asks, cached for the others."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def plan(
    shape: tuple[int, int],
    place: Sequence[int],
    device: torch.device,
    valid: Tensor | None = None,
    write: Tensor | None = None,
    reset: Tensor | None = None,
    watch: Watch | None = None,
    packed: bool = True,
) -> Plan:
    """The plan of a batch (B, T) with these masks, each (B, T) bool; the only place where the host
    reads them.

    packed=False does not move tokens. Raises ValueError unless masks are bool tensors of that
    shape.
    """
    B, T = shape
    for name, mask in (("valid", valid), ("write", write), ("reset", reset)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"{name} must be a bool mask (B, T) = {shape}, a tensor, got a {type(mask).__name__}"
            )
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(
                f"{name} must be a bool mask (B, T) = {shape}, got {mask.dtype} {tuple(mask.shape)}"
            )
    there, begins = _known(valid), _known(reset)
    if begins is None or not bool(begins.any()):
        reset = begins = None
    none = ((),) * B
    if there is None or bool(there.all()):
        found = none if begins is None else _places(begins)
        return Plan(device, T, tuple(place), (T,) * B, found, None, write, reset, watch=watch)
    length, order = there.sum(1), None
    if packed and bool((there[:, 1:] & ~there[:, :-1]).any()):
        order = (~there).long().argsort(dim=1, stable=True)
    if begins is not None:
        begins = begins & there
        begins = begins if order is None else begins.gather(1, order)
        reset = begins.to(device)
    order = None if order is None else order.to(device)
    write = write if write is None or order is None else write.gather(1, order)
    found = none if begins is None else _places(begins)
    lengths = tuple(length.tolist())
    length, holes = length.to(device), None if packed else there
    return Plan(device, T, tuple(place), lengths, found, length, write, reset, order, holes, watch)


def _known(mask: Tensor | None) -> Tensor | None:
    """A mask on the host; None on the meta device, which has shapes only."""
    return None if mask is None or mask.is_meta else mask.cpu()


def _places(mask: Tensor) -> tuple[tuple[int, ...], ...]:
    """The positions at which each row of a host mask is true."""
    return tuple(tuple(row.nonzero()[:, 0].tolist()) for row in mask)


@dataclass(frozen=True)
class Even:
    """All rows at the same phase; or a single token, whose rows may be at different phases."""

    phase: int
    open: bool


@dataclass(frozen=True)
class Grid:
    """Rows at different phases, holes and documents: each row's tokens on its own grid of `count`
    chunks.

    open: whether a row continues an open chunk. place (B, T): the tokens' slots, -1 for padding;
    source (B, N C): the token in each slot, T for none, or None if nothing moves; there (B, N, C):
    which slots hold a token, None for all. By chunk, starts (B,): the rows that begin a document
    with it, None for no row, and ends (B,): their phase after it, None if all complete it. anew
    (B,): rows whose first token begins a document.
    """

    count: int
    open: bool
    place: Tensor
    source: Tensor | None
    there: Tensor | None
    starts: tuple[Tensor | None, ...]
    ends: tuple[Tensor | None, ...]
    anew: Tensor | None


def _laid(plan: Plan, size: int, phases: list[int]) -> Even | Grid:
    opened = any(phases)
    if plan.tokens == 1 or (plan.even() and len(set(phases)) <= 1):
        return Even(phases[0] if phases else 0, opened)
    B, T, device = len(phases), plan.tokens, plan.device
    valid, reset = _masks(plan)
    phase = torch.tensor(phases)
    place = grid(phase, valid, reset, size)
    N = max(1, -(-(int(place.max()) + 1) // size))
    source = torch.full((B, N * size + 1), T, dtype=torch.long)
    slot, here = torch.where(valid, place, N * size), torch.arange(T).expand(B, T)
    source = source.scatter(1, slot, here)[:, :-1]
    there = (source < T).unflatten(1, (N, size))
    starts = F.pad(reset, (0, 1)).gather(1, source).unflatten(1, (N, size))[..., 0]
    last = torch.where(there, torch.arange(1, size + 1), 0).amax(-1)
    ends: list[Tensor | None] = []
    for j in range(N):
        phase = torch.where(last[:, j] > 0, last[:, j] % size, phase)
        ends.append(None if bool(there[:, j, -1].all()) else phase.to(device))
    moved = N * size != T or not bool((source == torch.arange(T)).all())
    anew = (reset & (valid.cumsum(1) == 1)).any(1)
    return Grid(
        count=N,
        open=opened,
        place=place.to(device),
        source=source.to(device) if moved else None,
        there=None if bool(there.all()) else there.to(device),
        starts=tuple(s.to(device) if bool(s.any()) else None for s in starts.unbind(1)),
        ends=tuple(ends),
        anew=anew.to(device) if bool(anew.any()) else None,
    )


def _masks(plan: Plan) -> tuple[Tensor, Tensor]:
    """valid and reset (B, T), on the host."""
    step = torch.arange(plan.tokens)
    valid = step < torch.tensor(plan.lengths)[:, None] if plan.holes is None else plan.holes
    reset = torch.zeros(len(plan.place), plan.tokens, dtype=torch.bool)
    for row, begins in enumerate(plan.begins):
        reset[row, list(begins)] = True
    return valid, reset


def grid(phase: Tensor, valid: Tensor, reset: Tensor, size: int) -> Tensor:
    """Each token's place on its row's own grid of `size` tokens, (B, T) int64: documents start on
    multiples of `size`.

    Padding tokens get the place -1. phase (B,) is the number of tokens read of the open cell.
    """
    B, T = valid.shape
    document = (reset & valid).cumsum(1)
    count = torch.zeros(B, T + 1, dtype=torch.long, device=valid.device)
    count = count.scatter_add(1, document, valid.long())
    before = count.cumsum(1) - count  # valid tokens of the call before each document
    lead = F.pad(phase[:, None], (0, T))  # tokens already in the open cell
    room = -(-(count + lead) // size) * size
    base = room.cumsum(1) - room + lead
    place = base.gather(1, document) + valid.cumsum(1) - 1 - before.gather(1, document)
    return torch.where(valid, place, -1)


@dataclass(frozen=True)
class Part:
    """The tokens of a call that lie in one segment of every row, again with padding at the end of
    rows.

    plan: that of these tokens. starts (B,) bool: rows whose segment begins with this part, None for
    no row; everyone: whether all do. begins (B, n) bool: these first tokens, None if there are
    none. where: the tokens' positions in the call, a slice, or (B, n) int64 with T for none.
    """

    plan: Plan
    starts: Tensor | None
    everyone: bool
    begins: Tensor | None
    where: slice | Tensor

    def take(self, x: Tensor) -> Tensor:
        """x (B, T, D) at these tokens, (B, n, D), 0 where there is none."""
        if isinstance(self.where, slice):
            return x[:, self.where]
        index = self.where[..., None].expand(-1, -1, x.shape[-1])
        return F.pad(x, (0, 0, 0, 1)).gather(1, index)


def _segments(plan: Plan, size: int) -> tuple[Part, ...]:
    phases = [p % size for p in plan.place]
    if not phases or plan.tokens == 0:
        return ()
    T = plan.tokens
    if plan.even() and T == 1:
        return (_part(replace(plan, made={}), [phase == 0 for phase in phases], slice(0, 1)),)
    if plan.even() and len(set(phases)) == 1:
        first, at, parts = phases[0], 0, list[Part]()
        while at < T:
            cut = slice(at, min(at + size - first, T))
            n = cut.stop - at
            inner = Plan(
                device=plan.device,
                tokens=n,
                place=tuple(p + at for p in plan.place),
                lengths=(n,) * len(phases),
                begins=plan.begins,
                write=None if plan.write is None else plan.write[:, cut],
                watch=plan.watch,
            )
            parts.append(_part(inner, [first == 0] * len(phases), cut))
            at, first = cut.stop, 0
        return tuple(parts)
    valid, reset = _masks(plan)
    place = grid(torch.tensor(phases), valid, reset, size)
    found = (_ragged_part(plan, place, number, size) for number in range(int(place.max()) // size + 1))
    return tuple(part for part in found if part.plan.tokens)


def _part(plan: Plan, starts: list[bool], where: slice | Tensor) -> Part:
    """A part, with the masks of segment beginnings moved to the device."""
    if not any(starts):
        return Part(plan, None, False, None, where)
    rows = torch.tensor(starts).to(plan.device)
    return Part(plan, rows, all(starts), F.pad(rows[:, None], (0, plan.tokens - 1)), where)


def _ragged_part(plan: Plan, place: Tensor, number: int, size: int) -> Part:
    """The part with segment `number` of each row's grid: consecutive tokens of the row."""
    T, device = plan.tokens, plan.device
    inside = (place >= 0) & (place // size == number)
    length = inside.sum(1)
    begin = torch.where(inside, torch.arange(T), T).amin(1)
    step = torch.arange(int(length.max()))
    index = torch.where(step < length[:, None], begin[:, None] + step, T)
    starts = (length > 0) & (F.pad(place, (0, 1)).gather(1, begin[:, None])[:, 0] % size == 0)
    begun: list[bool] = starts.tolist()
    firsts, at = begin.tolist(), [list(row) for row in plan.begins]
    anew = [first in row for first, row in zip(firsts, at, strict=True)]
    before = [[t for t in row if t <= first] for first, row in zip(firsts, at, strict=True)]
    reads = [
        first - row[-1] if row else old + first
        for first, row, old in zip(firsts, before, plan.place, strict=True)
    ]
    # A row without tokens here stays where its previous part, if any, has left it.
    left = ((place >= 0) & (place // size < number)).any(1).tolist()
    stands = [end if some else old for end, some, old in zip(plan.after(), left, plan.place, strict=True)]
    reads = [at if n else stand for at, n, stand in zip(reads, length.tolist(), stands, strict=True)]
    where = index.to(device)
    write = None if plan.write is None else F.pad(plan.write, (0, 1)).gather(1, where)
    reset = torch.zeros(index.shape, dtype=torch.bool)
    if reset.shape[1]:
        reset[:, 0] = torch.tensor(anew)
    inner = Plan(
        device=device,
        tokens=len(step),
        place=tuple(reads),
        lengths=tuple(length.tolist()),
        begins=tuple((0,) if new else () for new in anew),
        length=length.to(device),
        write=write,
        reset=reset.to(device) if any(anew) else None,
        watch=plan.watch,
    )
    return _part(inner, begun, where)


def joined(parts: Sequence[Part], values: list[Tensor], T: int) -> Tensor:
    """The inverse of `Part.take`: values (B, n, D) of each part at their positions, (B, T, D), 0
    elsewhere."""
    if all(isinstance(part.where, slice) for part in parts):
        return values[0] if len(values) == 1 else torch.cat(values, 1)
    y = torch.cat(values, 1)
    index = torch.cat([part.where for part in parts if isinstance(part.where, Tensor)], 1)
    whole = y.new_zeros(y.shape[0], T + 1, y.shape[2])
    return whole.scatter(1, index[..., None].expand_as(y), y)[:, :T]
