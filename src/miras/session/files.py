"""A session on disk: one safetensors file with its state, marks, history and learned weights.

The metadata is that of a stream's state, with the session's own as JSON. Tensors: `moments.N.*` the
current state (0) and that of each mark, `delta.N.*` what outer weights learned, `episodes.N` the
kept tokens of each episode, `past.N.M` the sequences of a reservoir. What several moments share is
stored once.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miras.nn.lm import LM
from miras.session.moment import KEEP, Episode, Moment, Reservoir, distinct
from miras.stream.files import BROKEN, check_model, now, read_sealed, restored, summary, write_sealed
from miras.stream.files import FORMAT as STATE_FORMAT
from miras.stream.files import FORMAT_VERSION as STATE_VERSION

FORMAT = "miras-session"
FORMAT_VERSION = 1
"""Format version of files from `write`; older ones stay readable."""

NOUN = "a saved session"
SUFFIX = ".miras"
"""The suffix of session files."""


@dataclass(frozen=True)
class About:
    """What a session stores besides its moments.

    model: `model_hash` of its base model; tokenizer: the fingerprint; folder: the last known folder
    of the model, "" for unknown; created: when (UTC, ISO 8601); keep: tokens of each episode that
    are kept.
    """

    model: str
    tokenizer: str
    folder: str
    created: str
    keep: int


@dataclass(frozen=True)
class SessionHeader:
    """The header of a session's file.

    tokens: read so far; time: when it was saved; summary: the model in a few words; episodes: names
    and times, in order; marks {name: tokens read then}; nbytes: of the file.
    """

    about: About
    tokens: int
    time: str
    summary: str
    episodes: tuple[tuple[str, str], ...]
    marks: dict[str, int]
    learned: bool
    nbytes: int


def write(path: Path, model: LM, about: About, moments: Sequence[Moment], marks: Sequence[str]) -> None:
    """Write a session: the current moment, then those of its marks, and the marks' names."""
    episodes = distinct(e for m in moments for e in m.episodes)
    deltas = distinct(m.delta for m in moments if m.delta)
    pasts = distinct(m.past for m in moments if m.past.seen)
    place = {id(each): n for pool in (episodes, deltas, pasts) for n, each in enumerate(pool)}
    tensors: dict[str, Tensor] = {}
    for n, moment in enumerate(moments):
        tensors |= {f"moments.{n}.{name}": x for name, x in moment.state.tensors().items()}
    for n, delta in enumerate(deltas):
        tensors |= {f"delta.{n}.{name}": x for name, x in delta.items()}
    for n, episode in enumerate(episodes):
        tensors[f"episodes.{n}"] = torch.from_numpy(episode.kept)
    for n, past in enumerate(pasts):
        tensors |= {f"past.{n}.{m}": torch.from_numpy(ids) for m, ids in enumerate(past.segments)}
    told = {
        **asdict(about),
        "episodes": [{f.name: getattr(e, f.name) for f in fields(e) if f.name != "kept"} for e in episodes],
        "past": [past.seen for past in pasts],
        "moments": [
            {
                "tokens": m.tokens,
                "episodes": [place[id(e)] for e in m.episodes],
                "delta": place.get(id(m.delta)),
                "past": place.get(id(m.past)),
            }
            for m in moments
        ],
        "marks": list(marks),
    }
    header = {
        "model": about.model,
        "tokens": json.dumps([moments[0].tokens]),
        "time": now(),
        "summary": summary(model),
        "session": json.dumps(told, allow_nan=False),
    }
    write_sealed(path, FORMAT, FORMAT_VERSION, tensors, header)


def read(path: Path, model: LM, tokenizer: str) -> tuple[About, list[Moment], list[str]]:
    """Read the output of `write`: (about, moments, the marks' names); for a stream's state, one
    moment without history.

    Raises like `Session.load`.
    """
    kinds = {FORMAT: FORMAT_VERSION, STATE_FORMAT: STATE_VERSION}
    header, tensors = read_sealed(path, kinds, NOUN)
    about, told = _told(path, header)
    check_model(path, about.model, header.get("summary", ""), model)
    if about.tokenizer not in ("", tokenizer):
        raise ValueError(
            f"{path} belongs to another tokenizer: it was saved with {about.tokenizer}, this is {tokenizer}"
        )
    if header["format"] == STATE_FORMAT:
        return about, [Moment(restored(model, 1, tensors, path))], []
    try:
        episodes = [
            Episode(**values, kept=tensors[f"episodes.{n}"].numpy())
            for n, values in enumerate(told["episodes"])
        ]
        pasts = [
            Reservoir(tuple(x.numpy() for x in _below(tensors, f"past.{n}.").values()), seen)
            for n, seen in enumerate(told["past"])
        ]
        # One object for each, so that moments keep sharing it.
        deltas = {
            n: _below(tensors, f"delta.{n}.") for n in {m["delta"] for m in told["moments"]} if n is not None
        }
        nothing: dict[str, Tensor] = {}
        moments = [
            Moment(
                restored(model, 1, _below(tensors, f"moments.{n}."), path),
                tuple(episodes[i] for i in m["episodes"]),
                nothing if m["delta"] is None else deltas[m["delta"]],
                Reservoir() if m["past"] is None else pasts[m["past"]],
            )
            for n, m in enumerate(told["moments"])
        ]
        return about, moments, list(told["marks"])
    except BROKEN as error:
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{path} is corrupt: its parts are inconsistent ({error!r})") from error


def read_header(path: str | Path, *, whole: bool = False) -> SessionHeader:
    """The header of a session's file; `whole` reads all of the file, to verify its checksum.

    Raises FileNotFoundError if there is none, and ValueError, naming it, if it is not a session or,
    as far as was read, corrupt.
    """
    path = Path(path)
    kinds = {FORMAT: FORMAT_VERSION, STATE_FORMAT: STATE_VERSION}
    header, _ = read_sealed(path, kinds, NOUN, with_tensors=whole)
    about, told = _told(path, header)
    try:
        latest, *marked = told["moments"]
        episodes = [told["episodes"][i] for i in latest["episodes"]]
        return SessionHeader(
            about=about,
            tokens=latest["tokens"],
            time=header["time"],
            summary=header["summary"],
            episodes=tuple((e["name"], e["time"]) for e in episodes),
            marks={name: m["tokens"] for name, m in zip(told["marks"], marked, strict=True)},
            learned=latest["delta"] is not None,
            nbytes=path.stat().st_size,
        )
    except BROKEN as error:
        raise ValueError(f"{path} is corrupt: its header is incomplete ({error!r})") from error


def _told(path: Path, header: dict[str, str]) -> tuple[About, dict[str, Any]]:
    """The session's part of the header; for a stream's state a default."""
    try:
        if header["format"] == STATE_FORMAT:
            tokens: list[int] = json.loads(header["tokens"])
            count = len(tokens)
            about = About(header["model"], "", "", header["time"], KEEP)
            moment = {"tokens": tokens[0], "episodes": [], "delta": None, "past": None}
            told: dict[str, Any] = {"episodes": [], "past": [], "moments": [moment], "marks": []}
        else:
            told, count = json.loads(header["session"]), 1
            about = About(**{f.name: told[f.name] for f in fields(About)})
    except BROKEN as error:
        raise ValueError(f"{path} is corrupt: its header is incomplete ({error!r})") from error
    if count != 1:
        raise ValueError(f"{path} holds {count} streams; a session can continue only one")
    return about, told


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with this prefix, without it; numbered ones in numerical order."""
    found = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: (int(item[0]) if item[0].isdigit() else -1, item[0])))


def find(folder: str | Path) -> list[tuple[Path, SessionHeader | ValueError]]:
    """The sessions in a folder, by name; for a broken file, what is wrong with it.

    Raises FileNotFoundError if it is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a folder with sessions")
    return [(path, _header_or_why(path)) for path in sorted(folder.glob(f"*{SUFFIX}")) if path.is_file()]


def _header_or_why(path: Path) -> SessionHeader | ValueError:
    try:
        return read_header(path)
    except ValueError as error:
        return error
    except OSError as error:
        return ValueError(f"{path} cannot be read: {error.strerror}")
