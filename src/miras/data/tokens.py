"""Text -> token ids, and memory-mapped token ids on disk."""

import hashlib
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from miras.data.text import Sources, find_sources, read_documents, standing
from miras.store.checksums import check_sealed, read_checked, sealed
from miras.store.files import appearing, sweep

FORMAT = "miras-tokens"
VERSION = 1
PIECE = 4 << 20  # bytes of one document tokenised at once: bounds memory, changes no token
DTYPES = {"uint8": "|u1", "uint16": "<u2", "uint32": "<u4"}

_SHOWN = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
BYTE_LETTERS = [chr(b if b in _SHOWN else 256 + sum(a not in _SHOWN for a in range(b))) for b in range(256)]
"""The letter for each byte in byte-level tokenizers: the byte itself if printable, else one from
256 on."""

TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BYTE_LETTERS[2],  # start and end of text, for tools that require them
    "eos_token": BYTE_LETTERS[3],
    "pad_token": BYTE_LETTERS[255],  # never occurs in UTF-8
    "padding_side": "left",
    # these letters may occur in a text, where they are not those bytes
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}
"""The byte tokenizer's config for `transformers`."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back; equal fingerprints mean equal ids for every text."""

    @property
    def vocab_size(self) -> int:
        """The number of ids: one more than the largest."""
        ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        """(num_tokens,) ids, without special tokens."""
        ...

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of the ids, U+FFFD for what is not UTF-8; ValueError for an id outside the
        vocabulary."""
        ...


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError unless it is a Tokenizer, and say how to convert one of `transformers`."""
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"a tokenizer of miras is needed, got a {type(tokenizer).__name__}; one of transformers is taken so: "
            f"tokenizer.save_pretrained(FOLDER), then miras.load_tokenizer(FOLDER)"
        )


@dataclass(frozen=True)
class ByteTokenizer:
    """The 256 byte values as tokens: nothing to train, nothing to download, any text."""

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def fingerprint(self) -> str:
        return "bytes"

    def to_json(self) -> bytes:
        """The same tokenizer as a file of the `tokenizers` library; `load_tokenizer` recognises
        it."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        model = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(BYTE_LETTERS)}, "merges": []}
        whole = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": level,
            "decoder": level,
            "model": model,
        }
        return json.dumps(whole).encode()

    def files(self) -> dict[str, bytes]:
        """The tokenizer files saved beside a model, by name."""
        return _files(self.to_json(), TOKENIZER_CONFIG)

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        return _checked_ids(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class FileTokenizer:
    """A `tokenizer.json` of the `tokenizers` library, plain or .xz, or its folder."""

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer as Backend

        path = Path(path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"No such tokenizer file: {str(path)!r}. Name a tokenizer.json or its folder."
            )
        data = read_checked(path)
        try:
            data = lzma.decompress(data) if path.suffix == ".xz" else data
            self._backend = Backend.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(
                f"{str(path)!r} is not a tokenizer file ({error}). Needed: what Tokenizer.save of the "
                "`tokenizers` library writes, as tokenizer.json or tokenizer.json.xz."
            ) from error
        self._backend.no_padding()
        self._backend.no_truncation()
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError(
                f"The tokenizer {str(path)!r} has an empty vocabulary. Train it before it is saved."
            )
        self._vocab_size = max(ids) + 1
        self._fingerprint = f"sha256:{hashlib.sha256(data).hexdigest()}"

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def to_json(self) -> bytes:
        """The file from which `load_tokenizer` loads the same tokenizer."""
        return self._backend.to_str().encode()

    def files(self) -> dict[str, bytes]:
        """The tokenizer files saved beside a model, by name."""
        return _files(self.to_json(), {"tokenizer_class": TOKENIZER_CONFIG["tokenizer_class"]})

    def spells_bytes(self) -> bool:
        """Whether it gives the ids of `ByteTokenizer` for every text."""
        if self.vocab_size != 256:
            return False
        own, plain = (
            json.loads(type(self._backend).from_str(x.decode()).to_str())
            for x in (ByteTokenizer().to_json(), self.to_json())
        )
        return all(own[part] == plain[part] for part in ("normalizer", "pre_tokenizer", "model"))

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        plain = text if isinstance(text, str) else text.decode("utf-8", errors="replace")
        return np.asarray(self._backend.encode(plain, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        return self._backend.decode(_checked_ids(ids, self.vocab_size).tolist(), skip_special_tokens=False)


def load_tokenizer(path: str | Path | None = None) -> ByteTokenizer | FileTokenizer:
    """The tokenizer in a file; bytes if there is no file or it says so."""
    found = None if path is None else FileTokenizer(path)
    return ByteTokenizer() if found is None or found.spells_bytes() else found


def _files(tokenizer: bytes, config: dict[str, Any]) -> dict[str, bytes]:
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def _checked_ids(ids: Sequence[int] | NDArray[Any], vocab_size: int) -> NDArray[Any]:
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"Token ids are one row of integers, got shape {array.shape} of {array.dtype}.")
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(
            f"Token ids must be in 0..{vocab_size - 1}, got {array.min()}..{array.max()}: "
            "were they made with this tokenizer?"
        )
    return array


@dataclass(frozen=True, eq=False, repr=False)
class TokenFile:
    """Memory-mapped token ids on disk, `<name>.tokens` (raw little-endian) beside `<name>.json`.

    Document i is tokens[documents[i]:documents[i + 1]], named names[i], of document_bytes[i] bytes
    of text.
    """

    path: Path  # without a suffix
    tokens: np.memmap[Any, Any]  # (num_tokens,) uint8, uint16 or uint32
    documents: NDArray[np.int64]  # (num_documents + 1,) offsets, from 0 to num_tokens
    names: tuple[str, ...]
    document_bytes: NDArray[np.int64]  # (num_documents,)
    vocab_size: int
    fingerprint: str  # of the tokenizer
    source_sha256: str
    tokens_sha256: str

    def __repr__(self) -> str:
        return f"TokenFile({str(self.path)!r}, {self.num_documents:,} documents, {self.num_tokens:,} tokens)"

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.names)

    @property
    def num_bytes(self) -> int:
        """Bytes of text, the divisor of bits per byte."""
        return int(self.document_bytes.sum())

    @classmethod
    def open(cls, path: str | Path) -> "TokenFile":
        """Map `<name>.tokens` after checking its header and length; ValueError if they do not
        fit."""
        stem = Path(path)
        stem = stem.with_suffix("") if stem.suffix in {".json", ".tokens"} else stem
        body, head = _pair(stem)
        for file in (head, body):
            if not file.is_file():
                raise FileNotFoundError(
                    f"No such token file: {str(file)!r}. Both {head.name} and {body.name} are needed."
                )
        try:
            header = json.loads(head.read_text(encoding="utf-8"))
            version = int(header["version"]) if header["format"] == FORMAT else 0
            if version > VERSION:
                raise ValueError(f"it has version {version}, this miras reads up to {VERSION}: upgrade miras")
            check_sealed(header)
            documents = header["documents"]
            offsets = np.asarray(documents["offsets"], dtype=np.int64)
            sizes = np.asarray(documents["num_bytes"], dtype=np.int64)
            names = tuple(str(name) for name in documents["names"])
            dtype, count = np.dtype(DTYPES[header["dtype"]]), int(header["count"])
            sound = version > 0 and len(names) == len(sizes) == len(offsets) - 1 and count > 0
            if not (sound and offsets[0] == 0 and offsets[-1] == count and (np.diff(offsets) >= 0).all()):
                raise ValueError("its fields are inconsistent")
            rest = {key: str(header[key]) for key in ("fingerprint", "source_sha256", "tokens_sha256")}
            vocab_size = int(header["vocab_size"])
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise _refused(head, f"is not a readable token header ({error!r})", stem) from error
        size, wanted = body.stat().st_size, count * dtype.itemsize
        if size != wanted:
            what = "is cut short" if size < wanted else "is too long"
            raise _refused(body, f"{what}: {size:,} bytes instead of {wanted:,}", stem)
        tokens = np.memmap(body, dtype=dtype, mode="r", shape=(count,))
        return cls(stem, tokens, offsets, names, sizes, vocab_size, **rest)

    def verify(self) -> None:
        """Read every token once and verify the checksum; ValueError if a byte has changed."""
        body, _ = _pair(self.path)
        with body.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.tokens_sha256:
            raise _refused(body, "has changed since it was written (its checksum differs)", self.path)


def prepare(sources: Sources, tokenizer: Tokenizer, cache_dir: str | Path) -> TokenFile:
    """The tokens of `sources`, computed once and cached in `cache_dir` under the hash of text and
    tokenizer.

    The text is read again only if a file's path, size or time has changed, and tokenised again only
    if its contents have. Files are written atomically; several processes may do this at once.
    ValueError as in `read_documents`, and for a damaged cached file.
    """
    with standing(sources) as files:
        return _prepared(files, tokenizer, cache_dir)


def _prepared(sources: Sources, tokenizer: Tokenizer, cache_dir: str | Path) -> TokenFile:
    cache = Path(cache_dir).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    quick = cache / f"{_quick_key(sources, tokenizer)}.source"
    try:
        source_sha256 = quick.read_text(encoding="ascii")
    except (FileNotFoundError, UnicodeDecodeError):
        source_sha256 = _hash_source(sources)
    key = hashlib.sha256(f"{VERSION} {source_sha256} {tokenizer.fingerprint}".encode()).hexdigest()[:32]
    stem = cache / key
    made = not all(file.exists() for file in _pair(stem))
    if made:
        _write(sources, tokenizer, source_sha256, stem)
    opened = TokenFile.open(stem)
    if not made:  # a file may have changed on disk since it was written
        opened.verify()
    if not quick.exists():
        with appearing(quick) as file:
            file.write(source_sha256.encode("ascii"))
    return opened


def _pair(stem: Path) -> tuple[Path, Path]:
    return stem.parent / f"{stem.name}.tokens", stem.parent / f"{stem.name}.json"


def _refused(file: Path, what: str, stem: Path) -> ValueError:
    return ValueError(
        f"{str(file)!r} {what}. Delete {stem.name}.tokens and {stem.name}.json there and run again: "
        "they are made anew."
    )


def _quick_key(sources: Sources, tokenizer: Tokenizer) -> str:
    seen: list[Any] = [VERSION, tokenizer.fingerprint]
    for source in find_sources(sources):
        seen.append(source.only)
        for path, name in source.files:
            status = path.stat()
            seen.append([str(path.resolve()), name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]


def _hash_source(sources: Sources) -> str:
    digest = hashlib.sha256()
    for document in read_documents(sources):
        _hash_document(digest, document.name, document.data)
    return digest.hexdigest()


def _hash_document(digest: Any, name: str, data: bytes) -> None:
    label = name.encode("utf-8", errors="surrogatepass")
    digest.update(len(label).to_bytes(8, "little") + label + len(data).to_bytes(8, "little"))
    digest.update(data)


def _write(sources: Sources, tokenizer: Tokenizer, source_sha256: str, stem: Path) -> None:
    name = (
        "uint8"
        if tokenizer.vocab_size <= 1 << 8
        else "uint16"
        if tokenizer.vocab_size <= 1 << 16
        else "uint32"
    )
    names: list[str] = []
    offsets = [0]
    sizes: list[int] = []
    source, body = hashlib.sha256(), hashlib.sha256()
    tokens_file, header_file = _pair(stem)
    sweep(stem.parent, r"[0-9a-f]{32}\.(tokens|json|source)")
    with appearing(tokens_file) as file:
        for document in read_documents(sources):
            _hash_document(source, document.name, document.data)
            count = 0
            for piece in _pieces(document.data, PIECE):
                raw = tokenizer.encode(piece).astype(DTYPES[name])
                count += len(raw)
                file.write(raw.data)
                body.update(raw.data)
            if count:
                names.append(document.name)
                offsets.append(offsets[-1] + count)
                sizes.append(len(document.data))
        if source.hexdigest() != source_sha256:
            raise ValueError(
                f"The text of {sources!r} changed while it was read, or between two runs without a new "
                f"size or time. Delete the .source files in {str(stem.parent)!r} and run again when nothing "
                "writes to the text."
            )
        if not names:
            raise ValueError(
                f"The tokenizer produces no tokens for {sources!r}. Use another tokenizer or another text."
            )
    header = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": name,
        "count": offsets[-1],
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "source_sha256": source_sha256,
        "tokens_sha256": body.hexdigest(),
        "documents": {"names": names, "offsets": offsets, "num_bytes": sizes},
    }
    # The header is written last: tokens without one are incomplete.
    with appearing(header_file) as file:
        file.write(json.dumps(sealed(header)).encode("ascii"))


# Before a space that ends a word: the one place where the usual pre-tokenizers (GPT-2, Llama,
# SentencePiece) always split. At a line end they depend on the context.
WORD_END = re.compile(rb"(?<=\S)(?= )")


def _pieces(data: bytes, limit: int) -> Iterator[bytes]:
    """`data` in parts of at most `limit` bytes, split at word ends, or else at character ends."""
    start = 0
    while len(data) - start > limit:
        end = start + limit
        # The second half only, so that parts stay large; one byte more, for the look-ahead.
        cuts = [match.end() for match in WORD_END.finditer(data, start + limit // 2, end + 1)]
        if cuts:
            end = cuts[-1]
        else:
            while end > start + 1 and data[end] & 0xC0 == 0x80:
                end -= 1
        yield data[start:end]
        start = end
    yield data[start:]
