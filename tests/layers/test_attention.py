"""Attention over a stream against a loop over tokens, and rotary angles against exact arithmetic."""

import dataclasses
import math
import random
from decimal import Decimal, localcontext

import pytest
import torch

from miras.layers.attention import attention, init_window, rotate

HEADS, WIDTH, FAR = 2, 6, 10_000_000
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803")


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(x, distance, theta):
    """x (H, D) turned by `distance` tokens, as complex numbers: real parts first, imaginary parts behind."""
    half = x.shape[-1] // 2
    angle = torch.tensor([distance * theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def loop(q, k, v, starts, size, theta, persistent):
    """One row (H, T, D), token by token; queries are turned by the distance to a key: no position occurs."""
    reads, begin = [], 0
    for t in range(q.shape[1]):
        begin = t if starts[t] else begin
        seen = range(begin if size is None else max(begin, t - size + 1), t + 1)
        score, value = [], []
        if persistent is not None:
            for p in range(persistent[0].shape[1]):
                score.append((q[:, t] * persistent[0][:, p]).sum(-1))
                value.append(persistent[1][:, p])
        for j in seen:
            here = q[:, t] if theta is None else turned(q[:, t], t - j, theta)
            score.append((here * k[:, j]).sum(-1))
            value.append(v[:, j])
        weight = torch.stack(score).div(math.sqrt(q.shape[-1])).exp()
        reads.append((weight[..., None] * torch.stack(value)).sum(0) / weight.sum(0)[:, None])
    return torch.stack(reads, 1)


class Streams:
    """Three rows of tokens with documents, and persistent tokens or none."""

    def __init__(self, T, persistent, resets, seed=0):
        self.q, self.k, self.v = (randn(seed + i, 3, HEADS, T, WIDTH) for i in range(3))
        g = torch.Generator().manual_seed(seed)
        self.reset = torch.rand(3, T, generator=g) < (3 / T if resets else 0)
        self.persistent = randn(seed + 7, 2, HEADS, persistent, WIDTH).unbind(0) if persistent else None

    def expected(self, size, theta):
        return torch.stack(
            [
                loop(self.q[b], self.k[b], self.v[b], self.reset[b], size, theta, self.persistent)
                for b in range(3)
            ]
        )


@pytest.mark.parametrize("theta", [None, 10_000.0, 50.0])
@pytest.mark.parametrize("persistent", [0, 2])
@pytest.mark.parametrize("size", [1, 3, 8, None])
@pytest.mark.parametrize("T", [1, 3, 7, 8, 9, 26])
def test_is_the_loop_whole_and_in_any_pieces(T, size, persistent, theta):
    streams = Streams(T, persistent, resets=True, seed=T)
    expected = streams.expected(size, theta)
    rng = random.Random(T)
    options = {"size": size, "theta": theta, "persistent": streams.persistent}
    for pieces in ([T], [1] * T, [min(T, rng.randint(1, 11)) for _ in range(T)]):
        window, at, reads = init_window(3, HEADS, WIDTH, size, streams.k[:0]), 0, []
        for n in pieces:
            now = slice(at, min(T, at + n))
            if now.start == T:
                break
            y, window = attention(
                *(x[:, :, now] for x in (streams.q, streams.k, streams.v)),
                window,
                reset=streams.reset[:, now],
                **options,
            )
            reads.append(y)
            at = now.stop
        torch.testing.assert_close(torch.cat(reads, 2), expected, rtol=0, atol=1e-12)
        assert window.next.tolist() == [T] * 3
        if size is not None:
            assert window.k.shape[2] == size


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("persistent", [0, 2])
@pytest.mark.parametrize("size", [1, 3, 8, None])
def test_ragged_rows_at_their_own_pace(size, persistent, resets):
    T, room = 40, 12
    streams = Streams(T, persistent, resets, seed=3)
    expected, rng = streams.expected(size, 10_000.0), random.Random(0)
    window, at = init_window(3, HEADS, WIDTH, size, streams.k[:0]), [0] * 3
    reads = [[] for _ in range(3)]
    while min(at) < T:
        length = [min(T - a, rng.choice([0, 1, 2, room - 1, room])) for a in at]
        q, k, v = (randn(99, 3, HEADS, room, WIDTH) for _ in range(3))  # padding that would show
        reset = torch.ones(3, room, dtype=torch.bool)  # in the padding, too
        for b, n in enumerate(length):
            now = slice(at[b], at[b] + n)
            for x, source in ((q, streams.q), (k, streams.k), (v, streams.v)):
                x[b, :, :n] = source[b, :, now]
            reset[b, :n] = streams.reset[b, now]
        y, window = attention(
            q,
            k,
            v,
            window,
            size=size,
            theta=10_000.0,
            persistent=streams.persistent,
            length=torch.tensor(length),
            reset=reset if resets else None,
        )
        assert y.isfinite().all()
        for b, n in enumerate(length):
            reads[b].append(y[b, :, :n])
            at[b] += n
    for b in range(3):
        torch.testing.assert_close(torch.cat(reads[b], 1), expected[b], rtol=0, atol=1e-12)
    assert window.next.tolist() == [T] * 3
    if size is not None:
        assert window.k.shape[2] == size


@pytest.mark.parametrize("size", [3, 8, None])
def test_two_documents_begin_in_one_window(size):
    q, k, v = (randn(i, 1, 1, 6, 4) for i in range(3))
    reset = torch.tensor([[False, False, True, False, True, False]])
    y, window = attention(q, k, v, init_window(1, 1, 4, size, k[:0]), size=size, theta=10_000.0, reset=reset)
    for t in (0, 2, 4):  # the first token of a document sees itself only
        torch.testing.assert_close(y[0, 0, t], v[0, 0, t], rtol=0, atol=1e-14)
    assert window.start.item() == 4
    more = [randn(i + 5, 1, 1, 1, 4) for i in range(3)]
    last, _ = attention(*more, window, size=size, theta=10_000.0)
    streams = [torch.cat([a[:, :, 4:], b], 2)[0] for a, b in zip((q, k, v), more, strict=True)]
    expected = loop(*streams, [True, False, False], size, 10_000.0, None)
    torch.testing.assert_close(last[0, :, 0], expected[:, -1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("position", [1, 4097, FAR, FAR + 12_345, 2**24 + 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rotary_angles_are_exact_far_out(position, dtype):
    half, theta = 16, 10_000
    x = torch.cat([torch.ones(half), torch.zeros(half)]).to(dtype)[None, None, None]
    y = rotate(x, torch.tensor([[position]]), float(theta))[0, 0, 0]
    expected = []
    with localcontext() as context:
        context.prec = 60
        for i in range(half):
            angle = position * Decimal(theta) ** (-Decimal(i) / half)
            expected.append(float(angle % (2 * PI)))
    angle = torch.tensor(expected, dtype=torch.float64)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(y.double(), torch.cat([angle.cos(), angle.sin()]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [3, 8, None])
def test_reads_do_not_depend_on_where_the_stream_is(size, dtype):
    q, k, v = (randn(i, 1, HEADS, 20, WIDTH).to(dtype) for i in range(3))
    persistent = randn(5, 2, HEADS, 3, WIDTH).to(dtype).unbind(0)
    reads = []
    for offset in (0, 1, FAR):
        window = init_window(1, HEADS, WIDTH, size, k[:0])
        window = dataclasses.replace(window, next=window.next + offset, start=window.start + offset)
        parts = []
        for now in (slice(0, 5), slice(5, 20)):
            y, window = attention(
                q[:, :, now], k[:, :, now], v[:, :, now], window, size=size, theta=1e4, persistent=persistent
            )
            parts.append(y)
        reads.append(torch.cat(parts, 2))
    tolerance = 1e-8 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(reads[1], reads[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(reads[2], reads[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [1, 3, None])
def test_gradients(size):
    q, k, v = (randn(i, 2, 1, 7, 4).requires_grad_() for i in range(3))
    persistent = randn(5, 2, 1, 2, 4).requires_grad_()
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[0, 3] = reset[1, 1] = True

    def read(q, k, v, persistent):
        window = init_window(2, 1, 4, size, k[:0])
        reads = []
        for now in (slice(0, 4), slice(4, 7)):
            y, window = attention(
                *(x[:, :, now] for x in (q, k, v)),
                window,
                size=size,
                theta=100.0,
                persistent=persistent.unbind(0),
                length=torch.tensor([now.stop - now.start, 2]),
                reset=reset[:, now],
            )
            y = torch.where((torch.arange(y.shape[2]) < 2)[:, None], y, 0)
            reads.append(y)
        return torch.cat(reads, 2)

    assert torch.autograd.gradcheck(read, (q, k, v, persistent))


@pytest.mark.parametrize("size", [3, 8, None])
@pytest.mark.parametrize("T", [1, 3, 9, 26])
@pytest.mark.parametrize("m", [2, 3])
def test_several_keys_of_a_token_some_of_them_left_out(T, size, m):
    q, k, v = randn(0, 1, HEADS, T, WIDTH), randn(1, 1, HEADS, m * T, WIDTH), randn(2, 1, HEADS, m * T, WIDTH)
    there = torch.rand(1, T, m, generator=torch.Generator().manual_seed(T)) < 0.6
    there[..., -1] = True
    reads = []
    for t in range(T):
        seen = [j for j in range(0 if size is None else max(0, t - size + 1), t + 1)]
        pairs = [(j, m * j + i) for j in seen for i in range(m) if there[0, j, i]]
        score = torch.stack([(turned(q[0, :, t], t - j, 100.0) * k[0, :, at]).sum(-1) for j, at in pairs])
        value = torch.stack([v[0, :, at] for _, at in pairs])
        weight = (score / math.sqrt(WIDTH)).softmax(0)
        reads.append((weight[..., None] * value).sum(0))
    expected, rng = torch.stack(reads, 1)[None], random.Random(T)
    for pieces in ([T], [1] * T, [rng.randint(1, 7) for _ in range(T)]):
        window = init_window(1, HEADS, WIDTH, None if size is None else m * size, q[:0])
        at, found = 0, []
        for n in pieces:
            stop = min(T, at + n)
            if at < stop:
                cut = slice(m * at, m * stop)
                y, window = attention(
                    q[:, :, at:stop],
                    k[:, :, cut],
                    v[:, :, cut],
                    window,
                    size=size,
                    theta=100.0,
                    there=there.flatten(1)[:, cut],
                )
                found.append(y)
            at = stop
        torch.testing.assert_close(torch.cat(found, 2), expected, rtol=0, atol=1e-10)
        assert window.k.shape[2] == m * (T if size is None else size)
