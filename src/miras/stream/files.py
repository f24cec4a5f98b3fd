"""A stream's state on disk: one safetensors file that belongs to one model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from miras.nn.folder import model_hash
from miras.nn.lm import LM, LMState
from miras.nn.reading import StreamState
from miras.store.files import check_place, write_atomically

BROKEN = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
"""Errors raised by parsing a malformed header."""

FORMAT = "miras-state"
FORMAT_VERSION = 1
"""Format version of files from `save_state`; older ones stay readable."""


@dataclass(frozen=True)
class StateHeader:
    """The header of a state's file.

    model: `model_hash` of the model it belongs to; tokens: read by each of its streams; time: when
    it was saved (UTC, ISO 8601); summary: a short description of the model; extra: further metadata
    from the caller.
    """

    format_version: int
    model: str
    tokens: tuple[int, ...]
    time: str
    summary: str
    extra: dict[str, str]


def save_state(
    path: str | Path, state: LMState, model: LM, *, extra: Mapping[str, str] | None = None
) -> StateHeader:
    """Write a state to one file, atomically, with the hash of its model and a checksum of
    everything.

    16-bit floats are written as fp32, which holds them exactly. A StreamState keeps the logits of
    its next token, so nothing is lost by continuing. Raises ValueError for the state of a model
    with another structure or size.
    """
    if reason := model.model.misfit(state):
        raise ValueError(f"{path} is not written: the state belongs to another model: {reason}")
    header = StateHeader(
        format_version=FORMAT_VERSION,
        model=model_hash(model),
        tokens=tuple(state.tokens.tolist()),
        time=now(),
        summary=summary(model),
        extra=dict(extra or {}),
    )
    told = {
        "model": header.model,
        "tokens": json.dumps(header.tokens),
        "time": header.time,
        "summary": header.summary,
        "extra": json.dumps(header.extra),
    }
    write_sealed(Path(path), FORMAT, FORMAT_VERSION, state.tensors(), told)
    return header


def check_state_place(flag: str, path: Path | None) -> None:
    """Raise ValueError, before work starts, if a state cannot be written to `path` or another file
    is there."""
    if path is not None:
        check_place(flag, path, _is_state, "a stream's state")


def _is_state(path: Path) -> bool:
    try:
        read_header(path)
    except (ValueError, OSError):
        return False
    return True


def read_header(path: str | Path) -> StateHeader:
    """The header of a state's file, without its tensors. Raises like `load_state`."""
    return _read(Path(path), with_tensors=False)[0]


def load_state(path: str | Path, model: LM) -> tuple[LMState, StateHeader]:
    """Load the state in a file, on the model's device, and the file's header.

    Raises FileNotFoundError if there is none, and ValueError if it is corrupt or truncated, of a
    newer format, or belongs to another model.
    """
    path = Path(path)
    header, tensors = _read(path, with_tensors=True)
    check_model(path, header.model, header.summary, model)
    return restored(model, len(header.tokens), tensors, path), header


def check_model(path: Path, wanted: str, about: str, model: LM) -> str:
    """The model's hash. Raises ValueError if a file was saved with another one."""
    if (own := model_hash(model)) != wanted:
        raise ValueError(
            f"{path} belongs to another model: it was saved with model {wanted} ({about}), "
            f"this model is {own}; a state belongs to the exact weights that made it"
        )
    return own


def restored(model: LM, rows: int, tensors: Mapping[str, Tensor], path: Path) -> LMState:
    """A model's state with that many rows, filled from a file's tensors; a StreamState if they
    include logits.

    On the model's device, in the dtypes of the model's states. Raises ValueError if they do not
    fit.
    """
    state: LMState = model.initial(rows)
    if "logits" in tensors:
        none = model.lm_head.weight.new_zeros(0, 0, dtype=torch.float32)
        state = StreamState(state.layers, state.tokens, none, place=state.place)
    shape = state.tensors()
    odd = list((tensors.keys() ^ shape.keys()) - {"place"})  # which older files do not have
    odd += [n for n in tensors.keys() & shape.keys() if tensors[n].dim() != shape[n].dim()]
    if odd:
        raise ValueError(
            f"{path} does not fit this version of the model's state: {', '.join(sorted(odd)[:5])}"
        )
    return state.with_tensors({n: x.to(shape[n]) for n, x in tensors.items()})


def summary(model: LM) -> str:
    """A short description of a model."""
    config = model.config
    mixers = " ".join(each.name for each in config.pattern)
    return f"{mixers}, hidden {config.hidden_size}, layers {config.num_hidden_layers}"


def now() -> str:
    """The time as written in files: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_sealed(
    path: Path, kind: str, version: int, tensors: Mapping[str, Tensor], told: Mapping[str, str]
) -> None:
    """Write tensors and metadata to one safetensors file, atomically, with a checksum."""
    stored = {name: _storable(x) for name, x in tensors.items()}
    metadata = {"format": kind, "format_version": str(version), **told}
    metadata["header_sha256"] = _digest({}, metadata)
    metadata["sha256"] = _digest(stored, metadata)
    write_atomically(path, save(stored, metadata))


def read_sealed(
    path: Path, kinds: Mapping[str, int], noun: str, with_tensors: bool = True
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the output of `write_sealed`, of one of these formats up to this version: (metadata,
    tensors).

    Without tensors only the header's own checksum is verified. Raises FileNotFoundError if there is
    no file, and ValueError, calling it a `noun`, if it is corrupt, truncated, of another format or
    a newer version.
    """
    if not path.is_file():
        if path.is_dir():
            raise FileNotFoundError(f"{path} is a folder; {noun} is a single file")
        raise FileNotFoundError(f"{path} does not exist; give the file of {noun}")
    path.open("rb").close()  # safetensors takes a file that may not be read for none
    try:
        with safe_open(path, "pt") as file:
            told = dict(file.metadata() or {})
            names = list(file.keys()) if with_tensors else []
            # Copies: a mapped tensor changes, or crashes the program, if another process overwrites
            # the file.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error
    kind = told.get("format")
    if kind is None or kind not in kinds:
        raise ValueError(f"{path} is not {noun} (its format is {kind!r})")
    version = told.get("format_version", "")
    if version.isdigit() and int(version) > kinds[kind]:
        raise ValueError(
            f"{path} has format version {version}, this miras reads up to {kinds[kind]}; upgrade miras"
        )
    checksum = told.pop("sha256", None)
    if checksum is None or not version.isdigit():
        raise ValueError(f"{path} is corrupt: its header has no checksum or no format version")
    head = {name: value for name, value in told.items() if name != "header_sha256"}
    if told.get("header_sha256", _digest({}, head)) != _digest({}, head):
        raise ValueError(
            f"{path} is corrupt: its checksum differs: a byte of its header has changed since it was saved"
        )
    if with_tensors and _digest(tensors, told) != checksum:
        raise ValueError(f"{path} is corrupt: its checksum differs: a byte has changed since it was saved")
    return told, tensors


def _read(path: Path, with_tensors: bool) -> tuple[StateHeader, dict[str, Tensor]]:
    noun = "a stream's state"
    told, tensors = read_sealed(path, {FORMAT: FORMAT_VERSION}, noun, with_tensors)
    try:
        extra: dict[str, str] = json.loads(told["extra"])
        tokens: list[int] = json.loads(told["tokens"])
        header = StateHeader(
            int(told["format_version"]), told["model"], tuple(tokens), told["time"], told["summary"], extra
        )
    except BROKEN as error:
        raise ValueError(f"{path} is corrupt: its header is incomplete ({error!r})") from error
    return header, tensors


def _storable(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    x = x.float() if x.is_floating_point() and x.element_size() < 4 else x
    # At a chunk's start A and the anchor are the same tensor, which must be stored twice.
    return x.clone(memory_format=torch.contiguous_format)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 over the metadata and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
