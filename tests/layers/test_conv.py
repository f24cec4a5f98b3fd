"""The causal convolution against torch's, over any cut, ragged rows and documents."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from miras.layers.conv import conv

TAPS = (1, 2, 4, 7)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(x, weight):
    """torch's own: x (B, T, D) behind K - 1 zeros."""
    K = weight.shape[1]
    return F.conv1d(F.pad(x.mT, (K - 1, 0)), weight[:, None], groups=x.shape[-1]).mT


def documents(x, weight, reset):
    """One row (1, T, D) cut where `reset` (T,) says, each document convolved alone."""
    starts = [0, *(t for t in range(1, x.shape[1]) if reset[t]), x.shape[1]]
    return torch.cat([padded(x[:, a:b], weight) for a, b in itertools.pairwise(starts)], 1)


@pytest.mark.parametrize("K", TAPS)
@pytest.mark.parametrize("T", [1, 3, 12])
def test_is_torchs_convolution_with_left_padding(K, T):
    x, weight, tail = randn(0, 2, T, 5), randn(1, 5, K), torch.zeros(2, K - 1, 5, dtype=torch.float64)
    y, tail = conv(x, tail, weight)
    torch.testing.assert_close(y, padded(x, weight), rtol=0, atol=1e-13)
    assert torch.equal(tail, F.pad(x, (0, 0, K - 1, 0))[:, T:])


@given(
    K=st.sampled_from(TAPS),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    resets=st.sets(st.integers(0, 30), max_size=6),
)
def test_any_cut_is_the_whole(K, lengths, resets):
    T = sum(lengths)
    x, weight, tail = randn(T, 1, T, 3), randn(K, 3, K), torch.zeros(1, K - 1, 3, dtype=torch.float64)
    reset = torch.tensor([t in resets for t in range(T)])
    pieces, at = [], 0
    for n in lengths:
        y, tail = conv(x[:, at : at + n], tail, weight, reset=reset[None, at : at + n])
        pieces.append(y)
        at += n
    torch.testing.assert_close(torch.cat(pieces, 1), documents(x, weight, reset), rtol=0, atol=1e-13)


@pytest.mark.parametrize("K", TAPS)
@pytest.mark.parametrize("with_reset", [False, True])
def test_ragged_rows_and_documents_are_each_row_alone(K, with_reset):
    # Three rows read at their own pace, 0 tokens at times; what stands in the padding is not a number.
    rng, B, T = random.Random(K), 3, 9
    rows = [randn(10 + b, 1, 40, 4) for b in range(B)]
    starts = torch.rand(B, 40, generator=torch.Generator().manual_seed(K)) < (0.2 if with_reset else 0)
    weight, tail = randn(3, 4, K), torch.zeros(B, K - 1, 4, dtype=torch.float64)
    alone_tail = [tail[:1]] * B
    at = [0] * B
    reads = [[] for _ in range(B)]
    for _ in range(4):
        length = [rng.randint(0, T) for _ in range(B)]
        x = torch.full((B, T, 4), torch.nan, dtype=torch.float64)
        reset = torch.ones(B, T, dtype=torch.bool)  # what it says of padding must not matter
        for b, n in enumerate(length):
            x[b, :n], reset[b, :n] = rows[b][0, at[b] : at[b] + n], starts[b, at[b] : at[b] + n]
        y, tail = conv(x, tail, weight, length=torch.tensor(length), reset=reset if with_reset else None)
        assert tail.isfinite().all()
        for b, n in enumerate(length):
            now = slice(at[b], at[b] + n)
            reads[b].append(y[b : b + 1, :n])
            _, alone_tail[b] = conv(
                rows[b][:, now], alone_tail[b], weight, reset=starts[b : b + 1, now] if with_reset else None
            )
            assert torch.equal(tail[b], alone_tail[b][0])
            at[b] += n
    for b in range(B):
        expected = documents(rows[b][:, : at[b]], weight, starts[b])
        torch.testing.assert_close(torch.cat(reads[b], 1), expected, rtol=0, atol=1e-13)


def test_a_documents_tail_holds_nothing_of_the_one_before():
    x, weight = randn(0, 1, 6, 2), randn(1, 2, 4)
    reset = torch.tensor([[False, False, False, False, True, False]])
    _, tail = conv(x, randn(2, 1, 3, 2), weight, reset=reset)
    assert torch.equal(tail, torch.cat([torch.zeros(1, 1, 2, dtype=torch.float64), x[:, 4:]], 1))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked):
    x, tail, weight = randn(0, 2, 5, 2), randn(1, 2, 3, 2), randn(2, 2, 4)
    reset = torch.tensor([[False, False, True, False, False], [False, False, False, True, False]])
    masks = {"length": torch.tensor([5, 3]), "reset": reset} if masked else {}
    leaves = [part.requires_grad_() for part in (x, tail, weight)]
    assert torch.autograd.gradcheck(lambda *parts: conv(*parts, **masks), leaves)
    assert torch.autograd.gradgradcheck(lambda *parts: conv(*parts, **masks), leaves)


def test_gradients_are_torchs():
    x, weight, out = randn(0, 2, 9, 3).requires_grad_(), randn(1, 3, 4).requires_grad_(), randn(2, 2, 9, 3)
    y, _ = conv(x, x.new_zeros(2, 3, 3), weight)
    found = torch.autograd.grad((y * out).sum(), [x, weight])
    expected = torch.autograd.grad((padded(x, weight) * out).sum(), [x, weight])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
