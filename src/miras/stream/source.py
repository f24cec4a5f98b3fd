"""What a reading begins with: a model folder with its tokenizer, and a text of any length as tokens."""

import lzma
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from miras.data.text import OPEN
from miras.data.tokens import WORD_END, ByteTokenizer, Tokenizer, load_tokenizer
from miras.nn.folder import load_model
from miras.nn.lm import LM

BLOCK = 1 << 16
"""Bytes of a text that are read from disk at once."""


def open_model(folder: Path, trust_remote_code: bool = False) -> tuple[LM, Tokenizer]:
    """A folder's model, and its `tokenizer.json` or else bytes. Raises ValueError when they do not fit."""
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
    """The file of a text. Raises FileNotFoundError or ValueError when it is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise ValueError(f"{name} is a folder; a stream is one file, or '-' for standard input")
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {name!r} (looked in {Path.cwd()})")
    return path


def text_length(name: str) -> int | None:
    """Bytes of text in a file, where that is known before its end: not of standard input and packed files."""
    return None if name == "-" or Path(name).suffix.lower() in OPEN else text_file(name).stat().st_size


def open_text(name: str) -> IO[bytes]:
    """A text's bytes, unpacked; '-' is standard input. Raises as `text_file`."""
    if name == "-":
        # Unbuffered: what has arrived is read, not waited for until a block is full.
        return cast(IO[bytes], os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0))
    path = text_file(name)
    opened = OPEN.get(path.suffix.lower())
    return path.open("rb") if opened is None else cast(IO[bytes], opened(path, "rb"))


def text_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """What is in a file, block by block. Raises ValueError when it is damaged or empty."""
    empty = True
    try:
        while block := file.read(BLOCK):
            empty = False
            yield block
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not what is in the file
        raise ValueError(f"{name} is damaged or not what its name says ({error})") from error
    if empty:
        raise ValueError(f"{'standard input' if name == '-' else name} is empty: nothing to read")


def text_tokens(blocks: Iterator[bytes], tokenizer: Tokenizer) -> Iterator[NDArray[np.int64]]:
    """The tokens of a text that comes in blocks, cut where words end, so that the cuts change no token."""
    if isinstance(tokenizer, ByteTokenizer):
        yield from map(tokenizer.encode, blocks)
        return
    rest = b""
    for block in blocks:
        rest += block
        cut = max((match.end() for match in WORD_END.finditer(rest)), default=0)
        if not cut and len(rest) > 16 * BLOCK:
            # A script without spaces: cut before the last character, which may not be whole.
            cut = len(rest) - 1
            while cut > 1 and rest[cut] & 0xC0 == 0x80:
                cut -= 1
        if cut:
            yield tokenizer.encode(rest[:cut])
            rest = rest[cut:]
    if rest:
        yield tokenizer.encode(rest)
