"""Ragged batches: any mask, packed and put back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miras.engine.plan import joined, plan


def pack(B, T, valid=None, write=None, reset=None, place=None):
    return plan((B, T), [0] * B if place is None else place, torch.device("cpu"), valid, write, reset)


@st.composite
def batches(draw):
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    mask = st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B)
    return B, T, *(torch.tensor(draw(mask)) if draw(st.booleans()) else None for _ in range(3))


@given(batch=batches(), tail=st.lists(st.integers(1, 3), max_size=2))
def test_round_trip(batch, tail):
    B, T, valid, write, reset = batch
    rows = pack(B, T, valid, write, reset)
    x = torch.randn(B, T, *tail, generator=torch.Generator().manual_seed(B * T))
    packed = rows.gather(x)
    here = torch.ones(B, T, dtype=torch.bool) if valid is None else valid
    for b in range(B):
        n = int(here[b].sum())
        assert torch.equal(packed[b, :n], x[b, here[b]])
        assert rows.length is None or int(rows.length[b]) == n
        if rows.write is not None:
            assert torch.equal(rows.write[b, :n], write[b, here[b]])
        if rows.reset is not None:
            assert torch.equal(rows.reset[b, :n], reset[b, here[b]])
            assert not rows.reset[b, n:].any()
    assert (rows.write is None) == (write is None)
    assert rows.reset is not None or reset is None or not reset.any()
    assert (rows.length is None) == bool(here.all())
    counted = rows.valid()
    assert counted is None or torch.equal(counted.sum(1), here.sum(1))
    assert torch.equal(rows.scatter(packed), x * here.view(B, T, *[1] * len(tail)))


@given(batch=batches())
def test_padding_comes_back_as_zero_whatever_was_computed_there(batch):
    B, T, valid, write, reset = batch
    rows = pack(B, T, valid, write, reset)
    if rows.length is None:
        return
    y = torch.ones(B, T, 2).masked_fill(~rows.valid()[..., None], torch.nan)
    assert torch.equal(rows.scatter(y), valid[..., None].expand(B, T, 2).float())


def test_full_rows_are_not_moved():
    x = torch.randn(2, 3, 4)
    for valid in (None, torch.ones(2, 3, dtype=torch.bool)):
        rows = pack(2, 3, valid)
        assert rows.gather(x) is x and rows.scatter(x) is x
    padded = pack(1, 3, torch.tensor([[True, True, False]]))
    assert padded.order is None and padded.length.tolist() == [2]


def test_gradients_pass_and_stop_at_padding():
    valid = torch.tensor([[False, True, False, True]])
    rows = pack(1, 4, valid)
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    rows.scatter(rows.gather(x) * 3).sum().backward()
    assert torch.equal(x.grad, 3.0 * valid[..., None].expand(1, 4, 2))


@pytest.mark.parametrize("name", ["valid", "write", "reset"])
@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(2, 3), r"torch.float32 \(2, 3\)"),
        (torch.ones(2, 3, dtype=torch.long), r"torch.int64 \(2, 3\)"),
        (torch.ones(3, 2, dtype=torch.bool), r"torch.bool \(3, 2\)"),
        (torch.ones(3, dtype=torch.bool), r"torch.bool \(3,\)"),
    ],
)
def test_a_mask_of_another_kind_is_refused(name, mask, got):
    with pytest.raises(ValueError, match=rf"{name} must be a bool mask \(B, T\) = \(2, 3\), got {got}"):
        pack(2, 3, **{name: mask})


@given(batch=batches(), size=st.integers(1, 4), data=st.data())
def test_segments_are_runs_of_one_grid_cell_and_join_to_the_whole(batch, size, data):
    B, T, valid, write, reset = batch
    phase = data.draw(st.lists(st.integers(0, 3 * size), min_size=B, max_size=B))
    rows = pack(B, T, valid, write, reset, phase)
    parts = rows.segments(size)
    x = torch.arange(1.0, B * T + 1).view(B, T, 1)
    taken = [part.take(x) for part in parts]
    real = rows.valid()
    real = torch.ones(B, T, dtype=torch.bool) if real is None else real
    if parts:
        assert torch.equal(joined(parts, taken, T), x * real[..., None])
    else:
        assert not real.any()
    for b in range(B):
        # One token after the other: which cell is it in, how far into it?
        at, cell, expected, place = phase[b], -1, [], {}
        for t in range(T):
            if not real[b, t]:
                continue
            starts = rows.reset is not None and bool(rows.reset[b, t])
            at = 0 if starts else at
            place[t] = at
            cell += at % size == 0 or cell < 0
            if cell == len(expected):
                expected.append((at % size == 0, []))
            expected[cell][1].append(t)
            at += 1
        assert rows.after()[b] == at
        found = []
        for part, y in zip(parts, taken, strict=True):
            n = y.shape[1] if part.plan.length is None else int(part.plan.length[b])
            if n:
                places = [int(z) - 1 - b * T for z in y[b, :n, 0]]
                found.append((part.starts is not None and bool(part.starts[b]), places))
                mine = part.plan
                assert (mine.write is None) == (rows.write is None)
                assert mine.write is None or torch.equal(mine.write[b, :n], rows.write[b, places])
                new = torch.zeros(n, dtype=torch.bool) if rows.reset is None else rows.reset[b, places]
                assert torch.equal(
                    new, torch.zeros(n, dtype=torch.bool) if mine.reset is None else mine.reset[b, :n]
                )
                assert mine.begins[b] == tuple(new.nonzero()[:, 0].tolist()) and mine.lengths[b] == n
                begun = mine.begins[b] == (0,)
                assert mine.place[b] == place[places[0]] or (begun and place[places[0]] == 0)
            assert not y[b, n:].any()
        assert found == expected


def test_segments_of_rows_in_step_are_slices():
    rows = pack(2, 9, write=torch.ones(2, 9, dtype=torch.bool), place=[3, 7])
    parts = rows.segments(4)
    assert [part.where for part in parts] == [slice(0, 1), slice(1, 5), slice(5, 9)]
    assert [part.plan.place for part in parts] == [(3, 7), (4, 8), (8, 12)]
    assert rows.after() == (12, 16) and rows.segments(4) is parts
    assert [part.everyone for part in parts] == [False, True, True]
    assert parts[0].starts is None and parts[1].starts.all()
