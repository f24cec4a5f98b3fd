"""Round trips, and a cache that is exact, made once, and refused when damaged."""

import hashlib
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from miras.data import ByteTokenizer, FileTokenizer, TokenFile, load_novel, load_tokenizer, prepare
from miras.data import tokens as module

# Blank lines, indented lines and runs of spaces are where a careless cut would change tokens.
RAGGED = "".join(f"{' ' * (n % 5)}line {n}{'  ' * (n % 3)}of it{chr(10) * (n % 4)}" for n in range(1, 2000))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 600 entries as GPT-2 has it, trained on the spot."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    backend.train_from_iterator([load_novel().heldout[:30000].decode(), RAGGED], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one.txt").write_bytes("Erste Zeile, zweiter Versuch: Öl.\n".encode() * 40)
    (folder / "two.txt").write_bytes(load_novel().heldout[:5000])
    return folder


@given(st.binary(max_size=300))
def test_bytes_are_tokens(data: bytes):
    ids = ByteTokenizer().encode(data)
    assert ids.dtype == np.int64 and ids.tolist() == list(data)
    assert ByteTokenizer().decode(ids) == data.decode("utf-8", errors="replace")


@given(st.text(max_size=200))
def test_round_trip(bpe: Path, text: str):
    for tokenizer in (ByteTokenizer(), FileTokenizer(bpe)):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64 and ids.flags.writeable
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
        assert tokenizer.encode(text.encode()).tolist() == ids.tolist()


def test_file_tokenizer_is_the_file(bpe: Path, tmp_path: Path):
    packed = tmp_path / "tokenizer.json.xz"
    packed.write_bytes(lzma.compress(bpe.read_bytes()))
    one, other = load_tokenizer(bpe), load_tokenizer(packed)
    assert (
        one.fingerprint
        == other.fingerprint
        == load_tokenizer(bpe.parent).fingerprint
        != ByteTokenizer().fingerprint
    )
    assert one.vocab_size == 600
    assert one.encode("There and back").tolist() == Tokenizer.from_file(str(bpe)).encode("There and back").ids
    assert isinstance(load_tokenizer(), ByteTokenizer)


def test_a_vocabulary_with_holes_is_as_large_as_its_largest_id(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 90, "?": 5}, unk_token="?")).save(str(path))
    assert FileTokenizer(path).vocab_size == 91


def test_bad_tokenizer_files_and_ids(bpe: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere.json")
    for name, data in {"bad.json": b"{}", "bad.json.xz": b"{}", "raw.json": b"\xff\xfe"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.*not a tokenizer file"):
            load_tokenizer(tmp_path / name)
    for tokenizer in (ByteTokenizer(), FileTokenizer(bpe)):
        for ids in ([-1], [5, tokenizer.vocab_size]):
            with pytest.raises(ValueError, match="must be in 0"):
                tokenizer.decode(ids)
        with pytest.raises(ValueError, match="one row of integers"):
            tokenizer.decode(np.zeros(3))
        assert tokenizer.decode([]) == ""


def test_prepared_tokens_are_the_text(bpe: Path, texts: Path, tmp_path: Path):
    one, two = (texts / "one.txt").read_bytes(), (texts / "two.txt").read_bytes()
    for tokenizer, dtype in ((ByteTokenizer(), np.uint8), (FileTokenizer(bpe), np.uint16)):
        made = prepare([texts], tokenizer, tmp_path / "cache")
        assert isinstance(made.tokens, np.memmap) and made.tokens.dtype == dtype
        assert made.names == ("one.txt", "two.txt") and made.num_documents == 2
        assert made.num_bytes == len(one) + len(two) and made.document_bytes.tolist() == [len(one), len(two)]
        assert made.num_tokens == made.documents[-1] == len(made.tokens)
        assert (made.vocab_size, made.fingerprint) == (tokenizer.vocab_size, tokenizer.fingerprint)
        for data, start, end in zip((one, two), made.documents[:-1], made.documents[1:], strict=True):
            assert made.tokens[start:end].tolist() == tokenizer.encode(data).tolist()
        made.verify()


def test_large_documents_are_tokenised_in_pieces_that_change_nothing(
    bpe: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (texts / "ragged.txt").write_text(RAGGED)
    whole = prepare(texts, FileTokenizer(bpe), tmp_path / "whole")
    monkeypatch.setattr(module, "PIECE", 500)
    sizes: list[int] = []

    class Counting(FileTokenizer):
        def encode(self, text: str | bytes):
            sizes.append(len(text))
            return super().encode(text)

    pieces = prepare(texts, Counting(bpe), tmp_path / "pieces")
    assert pieces.tokens.tolist() == whole.tokens.tolist()
    assert max(sizes) <= 500 and len(sizes) > 10


@given(
    st.lists(st.sampled_from(["a", "ö", "漢", "🙂", " ", "\n"]), max_size=60).map("".join), st.integers(4, 12)
)
def test_pieces_cut_no_character(text: str, limit: int):
    pieces = list(module._pieces(text.encode(), limit))
    assert b"".join(pieces) == text.encode() and all(len(piece) <= limit for piece in pieces)
    for piece in pieces:
        piece.decode("utf-8")


class Watched(ByteTokenizer):
    calls = 0

    def encode(self, text: str | bytes):
        type(self).calls += 1
        return super().encode(text)


@pytest.fixture
def watched() -> Iterator[Watched]:
    Watched.calls = 0
    yield Watched()


def test_the_same_text_is_tokenised_once_and_read_once(
    texts: Path, tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
):
    first = prepare([texts], watched, tmp_path / "cache")
    assert watched.calls == 2

    os.utime(texts / "one.txt", (1, 1))  # touched: read, found to be the same
    again = prepare([texts], watched, tmp_path / "cache")
    assert watched.calls == 2 and again.path == first.path

    monkeypatch.setattr(module, "read_documents", None)  # untouched: not even read
    assert prepare([texts], watched, tmp_path / "cache").path == first.path


def test_another_text_name_or_tokenizer_is_another_file(bpe: Path, texts: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    paths = {prepare(texts, ByteTokenizer(), cache).path, prepare(texts, FileTokenizer(bpe), cache).path}
    (texts / "two.txt").write_bytes(b"another text")
    paths.add(prepare(texts, ByteTokenizer(), cache).path)
    (texts / "two.txt").rename(texts / "three.txt")
    paths.add(prepare(texts, ByteTokenizer(), cache).path)
    assert len(paths) == 4


def test_nothing_half_made_is_left_behind(texts: Path, tmp_path: Path):
    class Failing(ByteTokenizer):
        def encode(self, text: str | bytes):
            raise RuntimeError("power cut")

    cache = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="power cut"):
        prepare(texts, Failing(), cache)
    assert list(cache.iterdir()) == []
    made = prepare(texts, ByteTokenizer(), cache)
    made.path.with_suffix(".json").unlink()  # stopped between the two files
    assert prepare(texts, ByteTokenizer(), cache).tokens.tolist() == made.tokens.tolist()
    assert not [file for file in cache.iterdir() if file.suffix == ".tmp"]


def test_damaged_files_are_refused_by_name(texts: Path, tmp_path: Path):
    made = prepare(texts, ByteTokenizer(), tmp_path / "cache")
    body, head = made.path.with_suffix(".tokens"), made.path.with_suffix(".json")
    good_body, good_head = body.read_bytes(), head.read_text()
    header = json.loads(good_head)

    for data, reason in {good_body[:-1]: "cut short", good_body + b"x": "too long", b"": "cut short"}.items():
        body.write_bytes(data)
        with pytest.raises(ValueError, match=reason) as caught:
            prepare(texts, ByteTokenizer(), tmp_path / "cache")
        assert str(body) in str(caught.value) and "Delete" in str(caught.value)
    body.write_bytes(b"?" + good_body[1:])
    with pytest.raises(ValueError, match="checksum") as caught:
        TokenFile.open(body).verify()
    assert str(body) in str(caught.value)
    with pytest.raises(ValueError, match="checksum"):
        prepare(texts, ByteTokenizer(), tmp_path / "cache")
    body.write_bytes(good_body)
    TokenFile.open(head).verify()

    head.write_text(good_head.replace('"num_bytes": [1', '"num_bytes": [3'))
    with pytest.raises(ValueError, match="checksum") as caught:
        prepare(texts, ByteTokenizer(), tmp_path / "cache")
    assert str(head) in str(caught.value) and head.read_text() != good_head
    del header["sha256"]  # a header of an older version
    head.write_text(json.dumps(header))
    assert prepare(texts, ByteTokenizer(), tmp_path / "cache").num_documents == 2

    documents = header["documents"]
    for change in (
        {"version": 2},
        {"format": "other"},
        {"dtype": "float32"},
        {"count": 0},
        {"count": header["count"] - 1},
        {"documents": {**documents, "offsets": documents["offsets"][:-1]}},
        {"documents": {**documents, "offsets": [0, 9**9, header["count"]]}},
        {"documents": {}},
    ):
        head.write_text(json.dumps({**header, **change}))
        with pytest.raises(ValueError, match="not a readable token header") as caught:
            TokenFile.open(made.path)
        assert str(head) in str(caught.value)
    for text in (good_head[:100], "[]", "", "[" * 100_000):
        head.write_text(text)
        with pytest.raises(ValueError, match="not a readable token header"):
            TokenFile.open(made.path)
    head.write_text(good_head)
    body.unlink()
    with pytest.raises(FileNotFoundError, match=r"\.tokens"):
        TokenFile.open(made.path)


def test_a_tokenizer_that_makes_nothing_is_an_error(texts: Path, tmp_path: Path):
    class Mute(ByteTokenizer):
        def encode(self, text: str | bytes):
            return super().encode(b"")

    with pytest.raises(ValueError, match="no token"):
        prepare(texts, Mute(), tmp_path / "cache")


def test_processes_agree(texts: Path, tmp_path: Path):
    code = "import sys; from miras.data import *; made = prepare(sys.argv[1:2], ByteTokenizer(), sys.argv[2])"
    code += "; print(made.path.name)"
    command = [sys.executable, "-c", code, str(texts), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = {process.communicate(timeout=60)[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running)
    made = prepare(texts, ByteTokenizer(), tmp_path / "cache")
    assert names == {made.path.name}
    digest = hashlib.sha256()
    for name in made.names:
        digest.update((texts / name).read_bytes())
    assert hashlib.sha256(made.tokens.tobytes()).hexdigest() == digest.hexdigest()
