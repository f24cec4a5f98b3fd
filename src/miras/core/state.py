"""States are values: frozen records of tensors whose first axis is the row (batch) axis."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tree = dict[str, Tensor]
"""One tensor for each weight of a memory, by the weight's name."""


T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


def _map(value: Any, fn: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    if isinstance(value, Tensor):
        return fn(name, value)
    if isinstance(value, Record):
        parts = {f.name: _map(getattr(value, f.name), fn, _join(name, f.name)) for f in fields(value)}
        return replace(value, **parts)
    if isinstance(value, dict):
        return {key: _map(part, fn, _join(name, key)) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_map(part, fn, _join(name, number)) for number, part in enumerate(value))
    return value


def _join(name: str, part: Any) -> str:
    return f"{name}.{part}" if name else str(part)


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Record):
        for field in fields(value):
            yield from _walk(getattr(value, field.name), _join(name, field.name))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _walk(part, _join(name, key))
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            yield from _walk(part, _join(name, number))


@dataclass(frozen=True)
class Record:
    """A frozen, possibly nested, collection of tensors with the row axis first."""

    def __init_subclass__(cls) -> None:
        # Without this, @dataclass would make one that prints every number.
        cls.__repr__ = cls.__repr__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_held(self)})"

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same record with `fn` applied to every tensor."""
        return _map(self, lambda _, x: fn(x))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its dotted path, in a fixed order (what a file on disk holds)."""
        return dict(_walk(self, ""))

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """This record's structure filled from `tensors`, a mapping as `tensors()` returns it."""
        return _map(self, lambda name, _: tensors[name])

    def detach(self) -> Self:
        """The same values, detached from the graph (for truncated backpropagation)."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> Self:
        """The same values on another device."""
        return self.map(lambda x: x.to(device))

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """The given rows, in that order; a row may occur several times."""

        def pick(x: Tensor) -> Tensor:
            return x.index_select(0, torch.as_tensor(rows, dtype=torch.long, device=x.device))

        return self.map(pick)

    @classmethod
    def stack(cls, records: Sequence[Self]) -> Self:
        """One record with the rows of all `records`, which must have the same structure."""
        columns = [r.tensors() for r in records]
        return records[0].with_tensors({n: torch.cat([c[n] for c in columns], 0) for n in columns[0]})

    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())


def _held(record: Record) -> str:
    """The size of a record, in words."""
    tensors = list(record.tensors().values())
    kinds = ", ".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in tensors))
    rows = f"{len(tensors[0])} row{'s' * (len(tensors[0]) != 1)}, " if tensors else ""
    return f"{rows}{len(tensors)} tensors, {record.nbytes():,} bytes of {kinds or 'nothing'}"


def known(x: Tensor) -> list[int]:
    """The values of x (B,) int64 on the host; zeros on the meta device, which has shapes only."""
    return [0] * len(x) if x.is_meta else x.tolist()


def misfit(there: Any, here: Any) -> str | None:
    """Where a state differs in structure from one that would fit, or None: types, names of tensors,
    heads and widths.

    The number of rows and the number of tokens or taps may differ.
    """
    if type(there) is not type(here):
        return f"it is a {type(there).__name__}, and a {type(here).__name__} is needed"
    if isinstance(here, Record):
        pairs = [(f.name, getattr(there, f.name), getattr(here, f.name)) for f in fields(here)]
    elif isinstance(here, dict):
        if there.keys() != here.keys():
            return f"it holds {', '.join(there) or 'nothing'}, and {', '.join(here) or 'nothing'} is needed"
        pairs = [(name, there[name], here[name]) for name in here]
    elif isinstance(here, tuple):
        if len(there) != len(here):
            return f"it has {len(there)} parts, and {len(here)} are needed"
        pairs = [(str(n), *both) for n, both in enumerate(zip(there, here, strict=True))]
    elif isinstance(here, Tensor):
        a, b = (
            x.shape[1:2] + x.shape[-1:] if x.dim() > 3 else x.shape[-1:] if x.dim() == 3 else ()
            for x in (there, here)
        )
        fits = there.dim() == here.dim() and a == b
        return None if fits else f"it is {tuple(there.shape)}, and one like {tuple(here.shape)} is needed"
    else:
        return None
    found = ((name, misfit(mine, other)) for name, mine, other in pairs)
    return next(
        (
            f"{name}: {reason}" if ":" not in reason else f"{name}.{reason}"
            for name, reason in found
            if reason
        ),
        None,
    )


def choose(rows: Tensor, yes: T, no: T) -> T:
    """`yes` in the rows (B,) where the mask is true, `no` elsewhere, for any structure of
    tensors."""
    others = dict(_walk(no, ""))
    return _map(yes, lambda name, x: torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, others[name]))


def ordinary(fn: Callable[P, R]) -> Callable[P, R]:
    """Make a function with inner gradients work under `torch.inference_mode`, which forbids them.

    Inputs are copied out of inference mode if needed, and the function runs in no-grad mode. Raises
    ValueError under transforms that do not work through inner gradients: forward-mode derivatives
    would be silently wrong.
    """

    @wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        if _transformed((*args, *kwargs.values())):
            raise ValueError(
                f"{fn.__name__}: forward-mode derivatives and the transforms of torch.func (jvp, vmap, grad ...) do "
                f"not work through a memory's inner gradients; use  torch.autograd.grad or backward(), and the rows "
                f"of a batch in place of vmap"
            )
        if not torch.is_inference_mode_enabled():
            return fn(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            copy: Any = lambda x: _map(x, lambda _, t: t.clone() if t.is_inference() else t)  # noqa: E731
            return fn(*map(copy, args), **{n: copy(x) for n, x in kwargs.items()})  # pyright: ignore

    return wrapped


def apart(fn: Callable[P, R]) -> Callable[P, R]:
    """Exclude a function from graphs of `torch.compile`, which lose the gradients through inner
    gradients."""

    @wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # disabled here, because doing so on import takes seconds
            disabled: Any = torch.compiler.disable(fn)
            return disabled(*args, **kwargs)
        return fn(*args, **kwargs)

    return wrapped


def _transformed(values: tuple[Any, ...]) -> bool:
    """Whether torch.func is transforming this call, or one of the values has a forward-mode
    derivative."""
    if torch._C._are_functorch_transforms_active():  # pyright: ignore
        return True
    if forward_ad._current_level < 0:  # pyright: ignore[reportPrivateUsage]
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for _, x in _walk(values, ""))
