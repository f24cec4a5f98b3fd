"""Published recurrences as plain token loops, written from their papers and sharing no code with `miras`.

One head of one row, everything projected: q, k (T, d_k), v (T, d_v), meant to be fp64. Row vectors: y = q @ S
with S (d_k, d_v), so the papers' column-vector equations appear transposed. Gates are natural values with the
token first: (T,), or (T, ...) broadcastable to the weight from there, that is (T, d_in, 1) per input channel and
(T, 1, d_out) or (T, d_out) per output channel. Every oracle returns the reads (T, d_v), each taken after its
token is written, and the last state under the names of `State.tensors()`: accumulators "A.<weight>", surprise
"S.<weight>". Chunked models take their gradients at the weights before the first token of the chunk (tokens
count from 0). All are differentiable in all their tensors. A0 is the start, zero where it may be left out.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Tree = dict[str, Tensor]
Result = tuple[Tensor, Tree]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, A0: Tensor | None = None) -> Result:
    """S_t = S_{t-1} + k_t^T v_t (MIRAS table 1, "Linear attention")."""
    S, reads = _start(k, v, A0), []
    for t in range(len(q)):
        S = S + torch.outer(k[t], v[t])
        reads.append(q[t] @ S)
    return torch.stack(reads), {"A.w": S}


def retnet(q: Tensor, k: Tensor, v: Tensor, decay: float | Tensor, A0: Tensor | None = None) -> Result:
    """S_t = decay S_{t-1} + k_t^T v_t, one constant per head (MIRAS table 1)."""
    S, reads = _start(k, v, A0), []
    for t in range(len(q)):
        S = decay * S + torch.outer(k[t], v[t])
        reads.append(q[t] @ S)
    return torch.stack(reads), {"A.w": S}


def mamba2(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, lr: Tensor, A0: Tensor | None = None) -> Result:
    """S_t = (1 - forget_t) S_{t-1} + lr_t k_t^T v_t, with q = C, k = B and lr = dt (MIRAS table 1, "Mamba")."""
    S, reads = _start(k, v, A0), []
    for t in range(len(q)):
        S = (1 - forget[t]) * S + lr[t] * torch.outer(k[t], v[t])
        reads.append(q[t] @ S)
    return torch.stack(reads), {"A.w": S}


def gla(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, A0: Tensor | None = None) -> Result:
    """S_t = diag(keep_t) S_{t-1} + k_t^T v_t, keep (T, d_k) per key channel (GLA; MIRAS table 1, as amended)."""
    S, reads = _start(k, v, A0), []
    for t in range(len(q)):
        S = torch.diag(keep[t]) @ S + torch.outer(k[t], v[t])
        reads.append(q[t] @ S)
    return torch.stack(reads), {"A.w": S}


def hgrn2(q: Tensor, keep: Tensor, v: Tensor, A0: Tensor | None = None) -> Result:
    """S_t = diag(keep_t) S_{t-1} + (1 - keep_t)^T v_t, keep (T, d_k): the key is 1 - keep (MIRAS table 1)."""
    S, reads = _start(keep, v, A0), []
    for t in range(len(q)):
        S = torch.diag(keep[t]) @ S + torch.outer(1 - keep[t], v[t])
        reads.append(q[t] @ S)
    return torch.stack(reads), {"A.w": S}


def deltanet(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, A0: Tensor | None = None) -> Result:
    """S_t = (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t (Titans appendix C; MIRAS table 1)."""
    S, reads = _start(k, v, A0), []
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    for t in range(len(q)):
        S = (eye - beta[t] * torch.outer(k[t], k[t])) @ S + beta[t] * torch.outer(k[t], v[t])
        reads.append(q[t] @ S)
    return torch.stack(reads), {"A.w": S}


def gated_deltanet(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor, A0: Tensor | None = None
) -> Result:
    """S_t = alpha_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t, alpha (T,) the kept share (MIRAS table 1)."""
    S, reads = _start(k, v, A0), []
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    for t in range(len(q)):
        S = alpha[t] * (eye - beta[t] * torch.outer(k[t], k[t])) @ S + beta[t] * torch.outer(k[t], v[t])
        reads.append(q[t] @ S)
    return torch.stack(reads), {"A.w": S}


def deltaproduct(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor, A0: Tensor | None = None
) -> Result:
    """n delta steps per token: k (T, n, d_k), v (T, n, d_v), beta (T, n), alpha (T,) (MIRAS table 1, as amended).

    S_t = alpha_t P_n ... P_1 S_{t-1} + sum_j P_n ... P_{j+1} beta_j k_j^T v_j with P_i = I - beta_i k_i^T k_i.
    """
    S, reads = _start(k, v, A0), []
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    for t in range(len(q)):
        after, write = eye, torch.zeros_like(S)
        for j in reversed(range(k.shape[1])):
            write = write + after @ (beta[t, j] * torch.outer(k[t, j], v[t, j]))
            after = after @ (eye - beta[t, j] * torch.outer(k[t, j], k[t, j]))
        S = alpha[t] * after @ S + write
        reads.append(q[t] @ S)
    return torch.stack(reads), {"A.w": S}


def longhorn(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, A0: Tensor | None = None) -> Result:
    """S_t = (I - d_t k_t^T k_t) S_{t-1} + d_t k_t^T v_t, d_t = beta_t / (1 + beta_t k_t k_t^T) (Titans appendix C).

    The implicit step of the delta rule. beta (T,), or (T, d_v) per output channel.
    """
    S, reads = _start(k, v, A0), []
    for t in range(len(q)):
        step = beta[t] / (1 + beta[t] * (k[t] @ k[t]))
        S = S - step * torch.outer(k[t], k[t] @ S - v[t])
        reads.append(q[t] @ S)
    return torch.stack(reads), {"A.w": S}


def mlstm(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Result:
    """C_t = f_t C_{t-1} + i_t k_t^T v_t, n_t = f_t n_{t-1} + i_t k_t, y_t = q_t C_t / max(1, |q_t n_t|) (xLSTM).

    f, i (T,) after their links, without the paper's stabiliser; the key scale 1 / sqrt(d_k) is the caller's.
    """
    C, n, reads = _start(k, v, None), torch.zeros_like(k[0]), []
    for t in range(len(q)):
        C = f[t] * C + i[t] * torch.outer(k[t], v[t])
        n = f[t] * n + i[t] * k[t]
        reads.append(q[t] @ C / (q[t] @ n).abs().clamp_min(1))
    return torch.stack(reads), {"A.w": C, "n": n}


def rwkv7(
    q: Tensor, w: Tensor, a: Tensor, k_hat: Tensor, k_tilde: Tensor, v: Tensor, A0: Tensor | None = None
) -> Result:
    """S_t = (diag(w_t) - (a_t . k^_t)^T k^_t) S_{t-1} + k~_t^T v_t; w, a (T, d_k) (RWKV-7).

    What is read (along k^) and where it is removed (along a . k^) differ, so this is no gradient step of one loss.
    """
    S, reads = _start(k_hat, v, A0), []
    for t in range(len(q)):
        transition = torch.diag(w[t]) - torch.outer(a[t] * k_hat[t], k_hat[t])
        S = transition @ S + torch.outer(k_tilde[t], v[t])
        reads.append(q[t] @ S)
    return torch.stack(reads), {"A.w": S}


def titans_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    forget: Tensor,
    chunk: int,
    decayed: bool = False,
    A0: Tensor | None = None,
) -> Result:
    """Titans eq. 13, 14 and 18 with a matrix memory (appendix C, eq. 32-33) and the half square as loss.

    S_t = momentum_t S_{t-1} - lr_t k_t^T (k_t W_anchor - v_t), W_t = (1 - forget_t) W_{t-1} + S_t. With `decayed` the
    anchor is multiplied by 1 - forget of every token of the chunk through t (Gated DeltaNet's place for it).
    """
    W = _start(k, v, A0)
    S, reads = torch.zeros_like(W), []
    anchor, kept = W, torch.ones_like(W)
    for t in range(len(q)):
        if t % chunk == 0:
            anchor, kept = W, torch.ones_like(W)
        kept = kept * (1 - forget[t])
        at = kept * anchor if decayed else anchor
        S = momentum[t] * S - lr[t] * torch.outer(k[t], k[t] @ at - v[t])
        W = (1 - forget[t]) * W + S
        reads.append(q[t] @ W)
    return torch.stack(reads), {"A.w": W, "S.w": S}


def titans_deep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tree,
    momentum: Tree,
    forget: Tree,
    A0: Tree,
    chunk: int,
    returning: bool = False,
) -> Result:
    """Titans eq. 13, 14 and 18 with M(x) = x + LN(gelu(x W_1) W_2) (camera-ready) and the half square as loss.

    A0 {"w1": (d, hidden), ..., "w<depth>": (hidden, d)}; one gate per weight. With `returning` what is forgotten is
    what was learned since A0: W_t = A0 + (1 - forget_t) (W_{t-1} - A0) + S_t.
    """
    origin = A0 if returning else {n: torch.zeros_like(a) for n, a in A0.items()}
    W, S, anchor, reads = dict(A0), {n: torch.zeros_like(a) for n, a in A0.items()}, A0, []
    for t in range(len(q)):
        if t % chunk == 0:
            anchor = dict(W)
        grad = _gradient(lambda r: 0.5 * r.square().sum(), anchor, k[t], v[t])
        for n in W:
            S[n] = momentum[n][t] * S[n] - lr[n][t] * grad[n]
            W[n] = origin[n] + (1 - forget[n][t]) * (W[n] - origin[n]) + S[n]
        reads.append(_mlp(q[t], W))
    return torch.stack(reads), _named("A", W) | _named("S", S)


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    W0: Tensor,
    b0: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    chunk: int,
    official: bool = False,
    offset: Tensor | None = None,
    eps: float = 1e-5,
    bias_rate: float = 1.0,
) -> Result:
    """TTT-Linear: f(x) = x + LN(x W + b), loss |f(k) - v|^2 / 2, W and b inner, LN's affine part outer (TTT).

    W_t = W_anchor - sum of lr_i grad_i over the chunk through t, lr (T,). `official` multiplies the sum read at place
    i = 1.. of its chunk by max(0, 1 / i + offset_i), offset (chunk,), as the authors' code does; that code also
    divides lr by the head width (left to the caller) and has eps = 1e-6. `bias_rate` multiplies the bias's lr.
    """

    def gradient(W: Tree, x: Tensor, target: Tensor) -> Tree:
        z = x @ W["w"] + W["b"]
        centred = z - z.mean()
        deviation = (centred.square().mean() + eps).sqrt()
        unit = centred / deviation
        g = ln_weight * (ln_weight * unit + ln_bias + x - target)
        dz = (g - g.mean() - unit * (g * unit).mean()) / deviation
        return {"w": torch.outer(x, dz), "b": bias_rate * dz}

    def read(W: Tree, x: Tensor) -> Tensor:
        return x + ln_weight * _layer_norm(x @ W["w"] + W["b"], eps) + ln_bias

    return _ttt(q, k, v, lr, {"w": W0, "b": b0}, chunk, gradient, read, official, offset)


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    A0: Tree,
    ln_weight: Tensor,
    ln_bias: Tensor,
    chunk: int,
    official: bool = False,
    offset: Tensor | None = None,
    eps: float = 1e-5,
    bias_rate: float = 1.0,
) -> Result:
    """TTT-MLP: f(x) = x + LN(gelu(x W_1 + b_1) W_2 + b_2), the rest as `ttt_linear` (TTT).

    A0 {"w1", "b1", "w2", "b2"}. The gelu is exact; the authors' code has the tanh approximation.
    """

    def read(W: Tree, x: Tensor) -> Tensor:
        z = _gelu(x @ W["w1"] + W["b1"]) @ W["w2"] + W["b2"]
        return x + ln_weight * _layer_norm(z, eps) + ln_bias

    def gradient(W: Tree, x: Tensor, target: Tensor) -> Tree:
        def loss(W: Tree) -> Tensor:
            return 0.5 * (read(W, x) - target).square().sum()

        grad = torch.func.grad(loss)(W)
        return {n: bias_rate * g if n[0] == "b" else g for n, g in grad.items()}

    return _ttt(q, k, v, lr, A0, chunk, gradient, read, official, offset)


def yaad(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tree,
    forget: Tree,
    delta: Tensor,
    A0: Tree,
    chunk: int,
    kind: Literal["norm", "coordinate", "mixture"] = "norm",
    eps: float = 1e-6,
) -> Result:
    """Yaad: W_t = (1 - forget_t) W_{t-1} - lr_t grad, the gradient with respect to M(k) = v + r being, by kind,

    norm        r where |r|_2 <= delta, else delta r / |r|_2                       (MIRAS eq. 15)
    coordinate  the same for every coordinate: r_j, else delta_j Sign(r_j)         (eq. 13-14)
    mixture     r where |r|_2 <= delta, else delta Sign(r), smooth with eps        (eq. 16 and 26)

    delta (T,), or (T, d_v) for coordinate.
    """

    def gradient(W: Tree, x: Tensor, target: Tensor, t: int) -> Tree:
        prediction, pull = torch.func.vjp(lambda W: _mlp(x, W), W)
        r = prediction - target
        if kind == "coordinate":
            d = torch.where(r.abs() <= delta[t], r, delta[t] * r.sign())
        else:
            size = r.norm()
            inside = size <= delta[t]
            unit = r / torch.where(inside, 1, size) if kind == "norm" else r / (r.square() + eps).sqrt()
            d = torch.where(inside, r, delta[t] * unit)
        return pull(d)[0]

    return _miras(q, k, v, lr, forget, A0, chunk, gradient, lambda _, A: A)


def moneta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tree,
    forget: Tree,
    A0: Tree,
    chunk: int,
    p: float = 3.0,
    q_exp: float = 4.0,
    literal: bool = False,
    eps: float = 1e-6,
) -> Result:
    """Moneta: A_t = (1 - forget_t) A_{t-1} - lr_t grad of sum (r^2 + eps)^(p/2), W_t = link(A_t) (MIRAS eq. 24-25).

    link is the mirror map A . |A|^(q-2) / |A|_q^(q-2), or literally A / |A|_q^(q-2), with one norm per weight.
    """

    def gradient(W: Tree, x: Tensor, target: Tensor, _: int) -> Tree:
        return _gradient(lambda r: ((r.square() + eps) ** (p / 2)).sum(), W, x, target)

    def link(_: str, A: Tensor) -> Tensor:
        size = (A.abs() ** q_exp).sum() ** (1 / q_exp)
        return (A if literal else A * A.abs() ** (q_exp - 2)) / size ** (q_exp - 2)

    return _miras(q, k, v, lr, forget, A0, chunk, gradient, link)


def memora(
    q: Tensor, k: Tensor, v: Tensor, lr: Tree, forget: Tree, A0: Tree, chunk: int, scale: Tree | None = None
) -> Result:
    """Memora: W_t = c softmax((1 - forget_t) log W_{t-1} - lr_t grad of |r|^2 / 2), over inputs (MIRAS eq. 21, 27).

    Kept as L_t = (1 - forget_t) L_{t-1} - lr_t grad, W = c softmax(L), which is the same where forget is per head
    (T,) or per output channel. A0 is L_0; c is sqrt(d_in) unless `scale` gives it by weight. L is
    meaningful up to a constant per output channel.
    """
    c = scale or {
        n: torch.tensor(math.sqrt(a.shape[0]), dtype=a.dtype, device=a.device) for n, a in A0.items()
    }

    def gradient(W: Tree, x: Tensor, target: Tensor, _: int) -> Tree:
        return _gradient(lambda r: 0.5 * r.square().sum(), W, x, target)

    return _miras(q, k, v, lr, forget, A0, chunk, gradient, lambda n, L: c[n] * L.softmax(0))


def _start(k: Tensor, v: Tensor, A0: Tensor | None) -> Tensor:
    return k.new_zeros(k.shape[-1], v.shape[-1]) if A0 is None else A0


def _named(prefix: str, tree: Tree) -> Tree:
    return {f"{prefix}.{n}": x for n, x in tree.items()}


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _mlp(x: Tensor, W: Tree) -> Tensor:
    """M(x) = x + LN(gelu(... gelu(x W_1) ...) W_depth), the norm without an affine part."""
    y = x @ W["w1"]
    for layer in range(2, len(W) + 1):
        y = _gelu(y) @ W[f"w{layer}"]
    return x + _layer_norm(y)


def _gradient(loss: Callable[[Tensor], Tensor], W: Tree, x: Tensor, target: Tensor) -> Tree:
    """The gradient with respect to W of loss(M(x; W) - target)."""
    return torch.func.grad(lambda W: loss(_mlp(x, W) - target))(W)


def _ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    A0: Tree,
    chunk: int,
    gradient: Callable[[Tree, Tensor, Tensor], Tree],
    read: Callable[[Tree, Tensor], Tensor],
    official: bool,
    offset: Tensor | None,
) -> Result:
    """W_t = W_anchor - place_i sum of lr grad over the chunk through t, with place_i = 1 unless official."""
    W, anchor, total, reads = A0, A0, A0, []
    for t in range(len(q)):
        place = t % chunk
        if place == 0:
            anchor, total = W, {n: torch.zeros_like(a) for n, a in A0.items()}
        grad = gradient(anchor, k[t], v[t])
        total = {n: total[n] + lr[t] * grad[n] for n in W}
        share = torch.ones_like(lr[t])
        if official:
            share = (share / (place + 1) + (0 if offset is None else offset[place])).clamp_min(0)
        W = {n: anchor[n] - share * total[n] for n in W}
        reads.append(read(W, q[t]))
    return torch.stack(reads), _named("A", W)


def _miras(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tree,
    forget: Tree,
    A0: Tree,
    chunk: int,
    gradient: Callable[[Tree, Tensor, Tensor, int], Tree],
    link: Callable[[str, Tensor], Tensor],
) -> Result:
    """A_t = (1 - forget_t) A_{t-1} - lr_t grad_t at the chunk's first W, W_t = link(A_t) for every token."""
    A, anchor, reads = dict(A0), A0, []
    for t in range(len(q)):
        if t % chunk == 0:
            anchor = {n: link(n, a) for n, a in A.items()}
        grad = gradient(anchor, k[t], v[t], t)
        A = {n: (1 - forget[n][t]) * a - lr[n][t] * grad[n] for n, a in A.items()}
        reads.append(_mlp(q[t], {n: link(n, a) for n, a in A.items()}))
    return torch.stack(reads), _named("A", A)
