"""Coefficients of the dual form: the factors of a chunk's reads and update that depend on gates and
keys only.

Shapes: B rows, H heads, N chunks of n tokens; (d_in, d_out) one weight.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.algorithm import bound_factors
from miras.core.rule import Rule, State, gates_of
from miras.engine.chunks import Chunks
from miras.engine.recompute import recomputed


class Coefficients(NamedTuple):
    """The coefficients of one weight's update, chunk by chunk, with the signs of the equations in
    `dual`.

    lr (..., n) the bounded step, keep (..., n). A read: first (..., n, 1), K0; table (..., n, n),
    -G; with momentum first_S (..., n, 1), G0. A after the chunk: late (..., n, 1), kept and with
    momentum kept_S (..., 1, 1), those of the last token; S after it: last (..., n, 1), -H, and
    carry (..., 1, 1), H0. H (..., n, n), -H, and H0 (..., n) are for an observer only.
    """

    lr: Tensor
    keep: Tensor
    first: Tensor
    table: Tensor
    late: Tensor
    kept: Tensor
    first_S: Tensor | None = None
    kept_S: Tensor | None = None
    last: Tensor | None = None
    carry: Tensor | None = None
    H: Tensor | None = None
    H0: Tensor | None = None

    def banded(self, band: Tensor) -> "Coefficients":
        """Coefficients for a loss window: a token writes all pairs in its row of the band (..., n,
        m + n)."""
        wide = lambda x: None if x is None else (x.mT @ band).mT  # noqa: E731
        late, last = wide(self.late), wide(self.last)
        assert late is not None
        return self._replace(table=self.table @ band, late=late, last=last)

    def earlier(self) -> "Coefficients":
        """The read coefficients of the previous token."""
        first, table, first_S = _late(self.first, 1), _late(self.table, 0), _late(self.first_S, 0)
        assert first is not None and table is not None
        return self._replace(first=first, table=table, first_S=first_S)

    @staticmethod
    def of(lr: Tensor, keep: Tensor, first: Tensor, table: Tensor, **more: Tensor | None) -> "Coefficients":
        """The coefficients with those of the last token."""
        return Coefficients(
            lr, keep, first, table, late=table[..., -1, :, None], kept=first[..., -1:, :], **more
        )


def _late(x: Tensor | None, first: float) -> Tensor | None:
    """x (..., n, m) shifted by one token, starting with `first`."""
    return None if x is None else F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)


def coefficients(rule: Rule, state: State, chunks: Chunks, watched: bool) -> dict[str, Coefficients]:
    """The coefficients of every weight for all chunks, from gates and keys."""
    write = None if chunks.write is None else chunks.write[:, None]
    open_chunk = rule.algorithm.step_bound > 0 and chunks.open
    shared: dict[tuple[int, ...], Coefficients] = {}
    table: dict[str, Coefficients] = {}
    for name in state.A:
        own = gates_of(chunks.gates, rule.update_gates, name)
        key = tuple(id(g) for g in own.values())
        # Weights with shared gates share these too, except for the earlier steps of an open chunk.
        if key not in shared or open_chunk:
            lr = step_sizes(rule, state, chunks, name, own["lr"])
            keep = torch.ones_like(lr)
            if "forget" in own:
                keep = 1 - own["forget"]
                keep = keep if write is None else torch.where(write, keep, 1)
            K0, steps = products(keep)
            if write is not None:
                steps = steps * write[..., None, :]
            step = -lr[..., None, :]
            if rule.algorithm.momentum:
                H0, H = products(own["momentum"] if write is None else torch.where(write, own["momentum"], 1))
                first_S = steps @ H0[..., None]
                shared[key] = Coefficients.of(
                    lr,
                    keep,
                    first=K0[..., None],
                    table=steps @ H * step,
                    first_S=first_S,
                    kept_S=first_S[..., -1:, :],
                    last=(H[..., -1, :] * step[..., 0, :])[..., None],
                    carry=H0[..., -1, None, None],
                    H=H * step if watched else None,
                    H0=H0 if watched else None,
                )
            else:
                shared[key] = Coefficients.of(lr, keep, K0[..., None], steps * step)
        table[name] = shared[key]
    return table


def step_sizes(rule: Rule, state: State, chunks: Chunks, name: str, lr: Tensor) -> Tensor:
    """One weight's steps from its gate, (B, H, N, n) or channel-wise, after algorithm and bound; 0
    unwritten."""
    algorithm = rule.algorithm
    lr = algorithm.step_size(lr, chunks.k)
    if chunks.write is not None:
        write = chunks.write[:, None]
        lr = torch.where(write if lr.dim() == 4 else write[..., None, None], lr, 0)
    strength = algorithm.step_bound
    if not strength:
        return lr

    def factors(k: Tensor, lr: Tensor) -> tuple[Tensor]:
        return (bound_factors((k @ k.mT).abs().tril(-1), lr, strength),)

    head = lr.abs() if lr.dim() == 4 else lr.abs().amax((-2, -1))
    (bound,) = recomputed(lambda t: factors(**t), {"k": chunks.k, "lr": head})
    if chunks.open:
        met = (chunks.k[:, :, 0] @ state.recent["key"].mT).abs()
        first = bound_factors(met, state.recent[name], strength)
        bound = torch.cat([bound[:, :, :1] * first[:, :, None], bound[:, :, 1:]], 2)
    return lr * (bound if lr.dim() == 4 else bound[..., None, None])


def products(a: Tensor) -> tuple[Tensor, Tensor]:
    """[t] = a_1 ... a_t and [t, i] = a_{i+1} ... a_t, 1 for i = t, 0 above: (..., n) to (..., n)
    and (..., n, n).

    The first carries the initial state, the second the input of every token. Formed and
    differentiated by multiplication alone, so that values and gradients are exact where a gate is 0
    or 1.
    """
    return _Products.apply(a)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.arange(a.shape[-1], device=a.device)
        first = a.cumprod(-1)
        table = torch.where(at < at[:, None], a[..., None], 1).cumprod(-2).tril_()
        ctx.save_for_backward(first, table)
        return first, table

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        # d [t, i] / d a_s is the product before s times the one after it, [s - 1, i] [t, s].
        first, table = ctx.saved_tensors
        by_first, by_table = grads
        found = F.pad(first[..., :-1], (1, 0), value=1) * (table.mT @ by_first[..., None])[..., 0]
        after = (table.mT @ by_table)[..., 1:, :]
        return found + F.pad((table[..., :-1, :] * after).sum(-1), (1, 0))
