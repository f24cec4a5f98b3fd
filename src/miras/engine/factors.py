"""The factors of a chunk's gradients for an MLP and L2, written out, with their backward pass.

Through x_1 = k, h_i = x_i W_i, x_{i+1} = gelu(h_i) and e = [k +] norm(h_L) - v the gradient of W_i
at token t is the rank-one x_i d_i^T with d_L = norm'(h_L) e and d_i = gelu'(h_i) * (d_{i+1}
W_{i+1}^T). Autograd gives the same; this version has fewer operations, accumulates in place and
saves less for the backward pass.

Shapes, with R = B * H and L the depth: k (R, n, Dk), v (R, n, Dv), W_i (R, d_in, d_out), x_i (R, n,
d_in), h_i and d_i (R, n, d_out).
"""

import math
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.activation import (
    EPS,
    gelu,
    gelu_backward,
    gelu_bend,
    layer_norm_bend,
    layer_norm_slope,
    made,
)
from miras.core.bias import L2
from miras.core.memory import MLP
from miras.core.rule import Rule, State, anchor_weights
from miras.core.state import Tree
from miras.engine.chunks import Fixed
from miras.engine.kernels import recorded


def has_factors(rule: Rule) -> bool:
    """Whether a rule's gradients are written out here."""
    memory = rule.memory
    plain = type(memory) is MLP and not (memory.bias or memory.affine) and type(rule.bias) is L2
    return plain and not rule.retention.decayed


def factors(rule: Rule, state: State, k: Tensor, v: Tensor, fixed: Fixed) -> tuple[Tree, Tree]:
    """For all tokens at once, the factors x_t, d_t of their gradients in every weight, at the
    chunk's anchor."""
    memory = rule.memory
    assert isinstance(memory, MLP)
    names = [f"w{i}" for i in range(1, memory.depth + 1)]
    anchor = {n: state.anchor[n].flatten(0, 1) for n in names}
    weights = list(anchor_weights(rule, anchor, fixed.base).values())
    if rule.algorithm.first_order:
        weights = [w.detach() for w in weights]
    inputs = (k, v, *weights)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        found = _Factors.apply(memory.residual, memory.norm, *inputs)
    else:
        found, _ = _forward(memory.residual, memory.norm, *inputs)
    between = len(names) - 1
    xs, ds, hs = found[:between], found[between : 2 * between + 1], found[2 * between + 1 :]
    xs = [made(gelu, x, h) for x, h in zip(xs, hs, strict=True)]
    return dict(zip(names, [k, *xs], strict=True)), dict(zip(names, ds, strict=True))


def _forward(
    residual: bool, norm: bool, k: Tensor, v: Tensor, *weights: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(x_2 ... x_L, d_1 ... d_L, h_1 ... h_{L-1}), and h_L with its mean and scale under a norm."""
    hs = [torch.bmm(k, weights[0])]
    xs: list[Tensor] = []
    for W in weights[1:]:
        xs.append(F.gelu(hs[-1]))
        hs.append(torch.bmm(xs[-1], W))
    z = hs.pop()
    e, stats = z, ()
    if norm:
        e, *stats = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
    e = (e + k if residual else e) - v
    ds = [layer_norm_slope(e, z, *stats) if norm else e]
    for W, h in zip(reversed(weights[1:]), reversed(hs), strict=True):
        ds.insert(0, gelu_backward(torch.bmm(ds[0], W.mT), h))
    return (*xs, *ds, *hs), (z, *stats)


def recorded_factors(
    residual: bool, norm: bool, k: Tensor, v: Tensor, *weights: Tensor
) -> tuple[Tensor, ...]:
    """The first output of `_forward`, computed by operations that can be differentiated any number
    of times."""
    hs = [torch.bmm(k, weights[0])]
    xs: list[Tensor] = []
    for W in weights[1:]:
        xs.append(hs[-1] * phi(hs[-1]))
        hs.append(torch.bmm(xs[-1], W))
    z = hs.pop()
    e, scale, mean = z, z.new_ones(()), lambda x: x.mean(-1, keepdim=True)
    if norm:
        scale = (z.var(-1, correction=0, keepdim=True) + EPS).rsqrt()
        e = (z - mean(z)) * scale
    normed, e = e, (e + k if residual else e) - v
    ds = [scale * (e - mean(e) - normed * mean(e * normed)) if norm else e]
    for W, h in zip(reversed(weights[1:]), reversed(hs), strict=True):
        ds.insert(0, torch.bmm(ds[0], W.mT) * (phi(h) + h * _bell(h)))
    return (*xs, *ds, *hs)


class _Factors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: bool, norm: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        found, kept = _forward(residual, norm, *inputs)
        ctx.choices = residual, norm
        ctx.set_materialize_grads(False)
        between = len(inputs) - 3
        # x_i and d_1 are wide and cheap to recompute.
        ctx.save_for_backward(*inputs, *found[between + 1 :], *kept)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        residual, norm = ctx.choices
        depth = (len(grads) + 2) // 3
        k, v, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (k, v, *rest[:depth])
            again = partial(recorded_factors, residual, norm)
            return None, None, *recorded(ctx.needs_input_grad[2:], again, grads, inputs)
        kept = iter(rest)
        weights, ds, hs = (list(islice(kept, n)) for n in (depth, depth - 1, depth - 1))
        z, *stats = kept
        by_x, by_d = list(grads[: depth - 1]), list(grads[depth - 1 : 2 * depth - 1])
        by_h = list(grads[2 * depth - 1 :])
        by_W: list[Tensor | None] = [None] * depth
        slopes = [gelu_backward(torch.ones_like(h), h) for h in hs]

        # Backward through d_i = gelu'(h_i) u_i, u_i = d_{i+1} W_{i+1}^T, the last computed first.
        for i, (h, d, slope) in enumerate(zip(hs, ds, slopes, strict=True)):
            g = by_d[i]
            if g is None:
                continue
            bent = gelu_bend(h).mul_(torch.bmm(d, weights[i + 1].mT)).mul_(g)
            by_h[i] = bent if by_h[i] is None else bent.add_(by_h[i])
            through = g * slope
            by_W[i + 1] = torch.bmm(through.mT, d)
            down = torch.bmm(through, weights[i + 1])
            by_d[i + 1] = down if by_d[i + 1] is None else down.add_(by_d[i + 1])

        # Backward through d_L and e.
        g = by_d[-1]
        g = torch.zeros_like(z) if g is None else g
        by_e = by_z = g
        if norm:
            mean, scale = stats
            normed = (z - mean).mul_(scale)
            e = (normed + k if residual else normed) - v
            by_e = layer_norm_slope(g, z, mean, scale)
            d = layer_norm_slope(e, z, mean, scale)
            by_z = layer_norm_slope(by_e, z, mean, scale).add_(layer_norm_bend(g, e, by_e, d, normed, scale))
        by_k = by_e.clone() if residual else torch.zeros_like(k)

        # Backward through h_i = x_i W_i, x_{i+1} = gelu(h_i).
        back = by_z
        for i in range(depth - 1, -1, -1):
            x = F.gelu(hs[i - 1]) if i else k
            W = by_W[i]
            by_W[i] = torch.bmm(x.mT, back) if W is None else W.baddbmm_(x.mT, back)
            if i == 0:
                by_k.baddbmm_(back, weights[0].mT)
                break
            into = torch.bmm(back, weights[i].mT)
            if by_x[i - 1] is not None:
                into.add_(by_x[i - 1])
            back = into.mul_(slopes[i - 1])
            if by_h[i - 1] is not None:
                back.add_(by_h[i - 1])
        return None, None, by_k, -by_e, *by_W


def phi(x: Tensor) -> Tensor:
    """The cumulative distribution function of the normal distribution."""
    return 0.5 * (1 + torch.erf(x * 0.5**0.5))


def _bell(x: Tensor) -> Tensor:
    """The density of the normal distribution."""
    return (-0.5 * x.square() - 0.5 * math.log(2 * math.pi)).exp()
