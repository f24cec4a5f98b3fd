"""Lanes give back the documents: whole, in order, with their own next tokens, whoever reads them."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miras.data import Batch, ByteTokenizer, Lanes, prepare


def documents(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that say where they are from: no two are equal."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return np.arange(1, offsets[-1] + 1, dtype=np.uint32), offsets


def read_epoch(lanes: Lanes, epoch: int = 0, world_size: int = 1) -> Batch:
    """Every lane of an epoch from end to end: (G, slots)."""
    steps = lanes.steps_per_epoch(world_size)
    rows = []
    for rank in range(world_size):
        batches = [lanes.batch(epoch * steps + step, rank, world_size) for step in range(steps)]
        rows.append([np.concatenate(parts, axis=1) for parts in zip(*batches, strict=True)])
    return Batch(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


sizes_st = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


@given(
    sizes=sizes_st,
    align=st.integers(1, 7),
    per_step=st.integers(1, 3),
    batch_size=st.integers(1, 3),
    data=st.data(),
)
def test_an_epoch_is_every_document_once_in_its_order(
    sizes: list[int], align: int, per_step: int, batch_size: int, data: st.DataObject
):
    tokens, offsets = documents(sizes)
    num_chunks = sum(-(-size // align) for size in sizes)
    batch_size = min(batch_size, num_chunks)
    world_size = data.draw(st.integers(1, max(1, num_chunks // batch_size)))
    epoch = data.draw(st.integers(0, 3))
    lanes = Lanes(tokens, offsets, batch_size=batch_size, seq_len=per_step * align, align=align, seed=5)
    read = read_epoch(lanes, epoch, world_size)

    # Dropping the padding, the lanes are the documents, one after the other.
    line = read.tokens[read.valid]
    assert sorted(line.tolist()) == tokens.tolist()
    starts, ends = (
        {int(tokens[a]) for a, b in pairs(offsets) if a < b},
        {int(tokens[b - 1]) for a, b in pairs(offsets) if a < b},
    )
    assert all(a + 1 == b or (a in ends and b in starts) for a, b in pairwise(line))

    # The next token of the same document, or no weight.
    has_next = read.valid & ~np.isin(read.tokens, sorted(ends))
    assert (read.weight == has_next).all() and read.weight.dtype == np.float32
    assert (read.targets == np.where(has_next, read.tokens + 1, 0)).all()
    assert (read.tokens[~read.valid] == 0).all()

    # A reset wherever a document or a lane starts, nowhere else; documents start on a chunk.
    first_of_document = read.valid & np.isin(read.tokens, sorted(starts))
    expected = first_of_document.copy()
    expected[:, 0] = True
    assert (read.reset == expected).all() and read.valid[:, 0].all()
    assert (np.nonzero(first_of_document)[1] % align == 0).all()

    # Lanes differ by a chunk at most, and padding follows a document's or the lane's end only.
    chunks = read.valid[:, ::align].sum(axis=1)
    assert chunks.max() - chunks.min() <= 1
    inner = read.valid[:, :-1] & ~read.valid[:, 1:]
    last = np.array([row.nonzero()[0][-1] for row in read.valid])
    at_lane_end = np.arange(read.valid.shape[1] - 1) == last[:, None]
    assert (np.isin(read.tokens[:, :-1], sorted(ends)) | at_lane_end)[inner].all()


def pairs(offsets: np.ndarray) -> list[tuple[int, int]]:
    return list(pairwise(offsets.tolist()))


def test_successive_steps_of_a_lane_are_the_text(tmp_path: Path):
    text = b"".join(b"%d bottles of beer, " % number for number in range(400))
    (tmp_path / "a.txt").write_bytes(text)
    file = prepare(tmp_path / "a.txt", ByteTokenizer(), tmp_path / "cache")
    lanes = Lanes(file, batch_size=3, seq_len=32, align=16)
    read = read_epoch(lanes)
    assert (
        b"".join(
            row[valid].astype(np.uint8).tobytes() for row, valid in zip(read.tokens, read.valid, strict=True)
        )
        == text
    )
    # A lane goes on into the text of the next one: only the last token of all has no target.
    assert read.weight.sum() == lanes.num_tokens - 1
    assert read.reset.sum() == 3
    again = lanes.batch(lanes.steps_per_epoch())
    assert again.reset[:, 0].all() and (again.tokens == lanes.batch(0).tokens).all()


def same(one: Batch, other: Batch) -> bool:
    return all((a == b).all() and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def test_a_batch_is_a_function_of_its_arguments():
    tokens, offsets = documents([50, 3, 70, 20, 90])
    make = {"batch_size": 2, "seq_len": 12, "align": 4}
    lanes = Lanes(tokens, offsets, **make, seed=1)
    steps = [7, 0, 40, 3, 7, 100_000]
    seen = [lanes.batch(step) for step in steps]
    assert all(
        same(batch, Lanes(tokens, offsets, **make, seed=1).batch(step))
        for step, batch in zip(steps, seen, strict=True)
    )
    assert same(seen[0], seen[4])
    assert not same(lanes.batch(0), Lanes(tokens, offsets, **make, seed=2).batch(0))
    assert not same(lanes.batch(0), lanes.batch(lanes.steps_per_epoch())), "each epoch has its own order"
    for field, dtype in zip(seen[0], (np.int64, np.int64, np.bool_, np.bool_, np.float32), strict=True):
        assert field.shape == (2, 12) and field.dtype == dtype


def test_the_rows_are_the_same_however_they_are_shared_out():
    tokens, offsets = documents([50, 3, 70, 20, 90])
    for step in (0, 2, 5, 9):
        whole = Lanes(tokens, offsets, batch_size=4, seq_len=8, align=4, seed=1).batch(step)
        for world_size in (2, 4):
            part = Lanes(tokens, offsets, batch_size=4 // world_size, seq_len=8, align=4, seed=1)
            ranks = [part.batch(step, rank, world_size) for rank in range(world_size)]
            assert same(whole, Batch(*(np.concatenate(rows) for rows in zip(*ranks, strict=True))))


def test_a_fresh_process_agrees():
    code = (
        "import numpy as np; from miras.data import Lanes\n"
        "lanes = Lanes(np.arange(500), range(0, 501, 50), batch_size=3, seq_len=20, align=10, seed=9)\n"
        "print(sum(lanes.batch(11), start=np.zeros((3, 20))).tolist())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    }
    lanes = Lanes(np.arange(500), range(0, 501, 50), batch_size=3, seq_len=20, align=10, seed=9)
    assert outputs == {f"{sum(lanes.batch(11), start=np.zeros((3, 20))).tolist()}\n"}


def test_what_does_not_fit_is_refused():
    tokens, offsets = documents([10, 20])
    fine = {"batch_size": 1, "seq_len": 8, "align": 4}
    with pytest.raises(ValueError, match=r"the chunk size\), 4; got 10\. Take 8 or 12"):
        Lanes(tokens, offsets, batch_size=1, seq_len=10, align=4)
    with pytest.raises(ValueError, match=r"9 lanes.* need at least 9 chunks.*30 tokens\) has 8"):
        Lanes(tokens, offsets, batch_size=3, seq_len=8, align=4).batch(0, 0, world_size=3)
    for name in fine:
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
            Lanes(tokens, offsets, **{**fine, name: 0})
    with pytest.raises(ValueError, match="seed"):
        Lanes(tokens, offsets, **fine, seed=-1)
    for wrong in ([0, 10], [1, 30], [0, 20, 10, 30], [30], [[0, 30]]):
        with pytest.raises(ValueError, match="`offsets` must rise"):
            Lanes(tokens, wrong, **fine)
    for wrong in (np.zeros(3), np.zeros((2, 3), dtype=int), np.zeros(0, dtype=int)):
        with pytest.raises(ValueError, match="`tokens` must be"):
            Lanes(wrong, **fine)
    for arguments in ((-1,), (0, 1, 1), (0, -1, 1)):
        with pytest.raises(ValueError, match="step >= 0"):
            Lanes(tokens, offsets, **fine).batch(*arguments)
    with pytest.raises(ValueError, match="world_size"):
        Lanes(tokens, offsets, **fine).batch(0, 0, 0)


def test_a_token_file_brings_its_own_offsets(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"some text")
    file = prepare(tmp_path / "a.txt", ByteTokenizer(), tmp_path)
    with pytest.raises(ValueError, match="omit `offsets`"):
        Lanes(file, [0, 9], batch_size=1, seq_len=4)
