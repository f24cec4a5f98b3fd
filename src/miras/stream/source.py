"""Inputs of a reading: a model folder with its tokenizer, and a text of any length as tokens."""

import io
import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from miras.data.text import DAMAGE, MAGIC, OPEN, ZIP, archive_kind, as_utf8, is_pipe, open_unpacked
from miras.data.tokens import WORD_END, ByteTokenizer, Tokenizer, load_tokenizer
from miras.nn.folder import load_model
from miras.nn.lm import LM

BLOCK = 1 << 16
"""Bytes of a text read from disk at once."""


def open_model(folder: Path, trust_remote_code: bool = False) -> tuple[LM, Tokenizer]:
    """A folder's model, and its `tokenizer.json` or else bytes. Raises ValueError if they do not
    fit."""
    model = load_model(folder, trust_remote_code=trust_remote_code)
    file = folder / "tokenizer.json"
    tokenizer = load_tokenizer(file if file.is_file() else None)
    if tokenizer.vocab_size > model.config.vocab_size:
        what = "tokenizer.json" if file.is_file() else "byte vocabulary (it has no tokenizer.json)"
        raise ValueError(
            f"{folder}: its {what} has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}"
        )
    return model, tokenizer


def text_file(name: str) -> Path:
    """The file of a text, or a pipe. Raises FileNotFoundError or ValueError if it is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise ValueError(f"{name} is a folder; give one file, or '-' for standard input")
    if not path.exists():
        raise FileNotFoundError(f"No such file: {name!r} (looked in {Path.cwd()})")
    return path


def text_length(name: str) -> int | None:
    """The number of bytes of text in a file, if known in advance: not for pipes and compressed
    files."""
    if name == "-" or is_pipe(text_file(name)):
        return None
    path = text_file(name)
    with path.open("rb") as file:
        head = file.read(16)
    packed = path.suffix.lower() in OPEN or any(map(head.startswith, MAGIC))
    return None if packed else path.stat().st_size


def open_text(name: str) -> IO[bytes]:
    """A text's bytes, decompressed; '-' is standard input. Raises like `text_file`."""
    if name != "-":
        return open_unpacked(text_file(name))
    # Unbuffered: read what has arrived instead of waiting for a full block.
    return open_unpacked(cast(io.RawIOBase, os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0)))


def text_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The contents of a file, block by block, in UTF-8. Raises ValueError if it is damaged, empty
    or an archive."""
    shown = "standard input" if name == "-" else name
    try:
        blocks = iter(lambda: file.read(BLOCK), b"")
        first = next(blocks, b"")
        if not first:
            raise ValueError(f"{shown} is empty: nothing to read")
        if (kind := archive_kind(first)) is not None:
            raise ValueError(
                f"{shown} is a {kind} archive, and a stream is one text: unpack it and name a file of it, or pipe it "
                f"in, as in `{'unzip -p' if kind == ZIP else 'tar -xOf'} ARCHIVE | miras ... -`"
            )
        yield from as_utf8(chain([first], blocks))
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a disk error, not damaged contents
        raise ValueError(f"{shown} is damaged or not what its name says ({error})") from error


def text_tokens(blocks: Iterator[bytes], tokenizer: Tokenizer) -> Iterator[NDArray[np.int64]]:
    """The tokens of a text that comes in blocks of bytes, split at word ends so that the splits
    change no token."""
    if isinstance(tokenizer, ByteTokenizer):
        yield from map(tokenizer.encode, blocks)
        return
    rest = b""
    for block in blocks:
        rest += block
        cut = max((match.end() for match in WORD_END.finditer(rest)), default=0)
        if not cut and len(rest) > 16 * BLOCK:
            # A script without spaces: split before the last character, which may be incomplete.
            cut = len(rest) - 1
            while cut > 1 and rest[cut] & 0xC0 == 0x80:
                cut -= 1
        if cut:
            yield tokenizer.encode(rest[:cut])
            rest = rest[cut:]
    if rest:
        yield tokenizer.encode(rest)
