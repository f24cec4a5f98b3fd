"""Calls that save only their inputs for the backward pass."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def recomputed(fn: Callable[..., tuple[Tensor, ...]], *trees: Mapping[Any, Tensor]) -> tuple[Tensor, ...]:
    """fn(*trees), recomputed with a graph in the backward pass."""

    def again(*leaves: Tensor) -> tuple[Tensor, ...]:
        values = iter(leaves)
        return fn(*({name: next(values) for name in tree} for tree in trees))

    return _Recompute.apply(again, *(x for tree in trees for x in tree.values()))


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.fn = fn
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            outputs = fn(*inputs)
        taken = {id(x) for x in inputs}
        distinct: list[Tensor] = []
        for x in outputs:  # outputs must not alias each other or an input
            distinct.append(x.clone() if id(x) in taken else x)
            taken.add(id(x))
        ctx.mark_non_differentiable(*(x for x in distinct if not x.is_floating_point()))
        return tuple(distinct)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed, again = ctx.needs_input_grad[1:], torch.is_grad_enabled()
        # Inputs may depend on each other; aliases do not, so each gets only its own gradient.
        inputs = [
            x.view_as(x) if again else x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            outputs = ctx.fn(*inputs)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, create_graph=again
            )
        )
        return (None, *(next(found) if need else None for need in needed))
