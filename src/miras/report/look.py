"""The surprise page from Python, to save as a file or show in a notebook."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miras.data.tokens import ByteTokenizer, Tokenizer, check_tokenizer
from miras.nn.folder import model_hash
from miras.nn.lm import LM, LMState
from miras.report.explorer import (
    Watched,
    agreement,
    bits_per_byte,
    facts_of,
    page_data,
    shortened,
    tracks_of,
)
from miras.report.frame import render
from miras.report.watch import watch
from miras.store.files import check_place, write_atomically


@dataclass(frozen=True)
class Page:
    """A self-contained HTML page; a notebook shows it.

    left_out: what it has no room for; agreement: how the memories' surprise correlates with the
    model's own.
    """

    html: str
    bits_per_byte: float
    left_out: str = ""
    agreement: str = ""

    def save(self, path: str | Path) -> Path:
        """Write the page to a file. Raises ValueError if another file, not a page of miras, would
        be overwritten."""
        path = Path(path)
        check_place("path", path, is_page, "a page of miras")
        write_atomically(path, self.html.encode("utf-8"))
        return path

    def __repr__(self) -> str:
        return f"Page({len(self.html):,} characters of HTML, {self.bits_per_byte:.4f} bits per byte)"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" width="100%" height="700" style="border:0"></iframe>'
        )


def surprise_page(
    model: LM,
    text: str | bytes | NDArray[np.int64],
    tokenizer: Tokenizer | None = None,
    state: LMState | None = None,
    *,
    layers: Sequence[int] = (),
    title: str = "Surprise",
    piece: int = 2048,
) -> Page:
    """Read a text (or its token ids) once, after `state`, and show what surprised the model and its
    memories.

    `tokenizer` None: tokens are bytes. `layers` are the memory layers to show, all by default.
    Raises ValueError for a layer without memory, and for no tokens.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    check_tokenizer(tokenizer)
    ids = tokenizer.encode(text) if isinstance(text, str | bytes) else text
    watched = watch(model, tokenizer, ids, state, layers=layers, piece=piece)
    facts = facts_of(watched, "a model in Python", described(model), more=False)
    return page_of(watched, facts, thin=not layers, title=title)


def page_of(
    watched: Watched, facts: list[tuple[str, str, str]], *, thin: bool, title: str, command: str = ""
) -> Page:
    """The page of a reading; `thin` leaves out what a small page has no room for."""
    tracks = tracks_of(watched, thin=thin)
    left_out, together = shortened(watched, tracks), agreement(watched)
    text = render(
        "surprise.html",
        title=title,
        facts=facts,
        data=page_data(watched, tracks),
        notes=[note for note in (together, left_out) if note],
        plain="",
        command=command,
    )
    return Page(text, bits_per_byte(watched), left_out, together)


def described(model: LM) -> str:
    """The model in a few words."""
    config = model.config
    return (
        f"{config.num_hidden_layers} layers of {' and '.join(dict.fromkeys(each.name for each in config.pattern))}, "
        f"{model.num_parameters():,} parameters, {model_hash(model)[:12]}"
    )


def is_page(path: Path) -> bool:
    """Whether a file is a page that miras wrote."""
    with path.open("rb") as file:
        return b'<meta name="generator" content="miras">' in file.read(256)
