"""Checkpoints with everything a run needs to continue as if it had not stopped.

A checkpoint is a model folder (config.json, model.safetensors) with `training.safetensors`
(optimizer, lane states, random state) and `training.json` (step, task, options, a hash of each
file).
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from miras.nn.config import ModelConfig
from miras.nn.folder import load_model, model_files, read_config, write_folder
from miras.nn.lm import LM, LMState
from miras.store.checksums import read_checked
from miras.store.files import drop, sweep

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    folder: Path,
    model: LM,
    optimizer: torch.optim.Optimizer,
    states: list[LMState | None],
    meta: dict[str, Any],
    extra: dict[str, bytes],
    keep: int,
) -> Path:
    """Write the checkpoint of `meta["step"]` atomically, and remove all but the newest `keep`.

    An existing complete checkpoint with the same contents stays. Leftovers of killed saves are
    removed.
    """
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    names = {id(p): name for name, p in model.named_parameters()}
    for p, values in optimizer.state.items():
        tensors |= {f"optimizer.{names[id(p)]}.{key}": torch.as_tensor(x) for key, x in values.items()}
    for lane, state in enumerate(states):
        if state is not None:
            tensors |= {f"lanes.{lane}.{name}": x.detach() for name, x in state.tensors().items()}
    files = model_files(model) | extra
    files["training.safetensors"] = save_tensors({n: x.contiguous().clone() for n, x in tensors.items()})
    meta = {
        "format_version": FORMAT_VERSION,
        **meta,
        "lanes": [state is not None for state in states],
        "rows": [0 if state is None else state.tokens.shape[0] for state in states],
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    path = folder / f"step-{meta['step']}"
    sweep(folder, r"step-\d+")
    if not _holds(path, meta["sha256"]):
        write_folder(path, files | {"training.json": json.dumps(meta, indent=2).encode()})
    for old in checkpoints(folder)[: -max(1, keep)]:
        drop(old)
    return path


def _holds(path: Path, hashes: dict[str, str]) -> bool:
    """Whether a complete checkpoint with exactly these files exists."""
    try:
        return read_meta(path)["sha256"] == hashes and bool(_read(path, hashes))
    except ValueError:
        return False


def read_meta(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint. ValueError names the damaged file and an older checkpoint."""
    file = path / "training.json"
    try:
        meta: Any = json.loads(read_checked(file))
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, f"{file} is missing, truncated or changed ({error})") from error
    if not isinstance(meta, dict):
        raise _refused(path, f"{file} is not the metadata of a checkpoint")
    if "format_version" in meta and meta["format_version"] != FORMAT_VERSION:
        version = meta["format_version"]
        raise _refused(path, f"{file}: checkpoint format {version!r}, this miras reads {FORMAT_VERSION}")
    odd = [name for name, kind in _META.items() if not isinstance(meta.get(name), kind)]
    if odd:
        raise _refused(path, f"{file} lacks {', '.join(odd)}")
    return meta


_META = {
    "format_version": int,
    "step": int,
    "tokens": int,
    "task": dict,
    "options": dict,
    "lanes": list,
    "rows": list,
    "sha256": dict,
}


def read_checkpoint_config(path: Path, trust_remote_code: bool = False) -> ModelConfig:
    """The config of a checkpoint's model. Raises ValueError like `read_meta`."""
    try:
        return read_config(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _refused(path, str(error)) from error


def _read(path: Path, hashes: dict[str, str]) -> dict[str, bytes]:
    """The files of a checkpoint, verified against their hashes."""
    files: dict[str, bytes] = {}
    for name, wanted in hashes.items():
        try:
            files[name] = (path / name).read_bytes()
        except OSError as error:
            raise _refused(path, f"{path / name} cannot be read ({error.strerror})") from error
        if hashlib.sha256(files[name]).hexdigest() != wanted:
            raise _refused(path, f"{path / name} is corrupt: its hash differs from the saved one")
    return files


def _refused(path: Path, why: str) -> ValueError:
    there = checkpoints(path.parent)
    older = there[: there.index(path)] if path in there else []
    way = f"; {older[-1]} is older: move {path.name} away to continue from it" if older else ""
    return ValueError(f"{why}{way}")


def load_checkpoint(
    path: Path, trust_remote_code: bool = False
) -> tuple[LM, dict[str, Tensor], dict[str, Any]]:
    """The model, the training tensors and the metadata of a checkpoint. Raises ValueError like
    `read_meta`."""
    meta = read_meta(path)
    if missing := {"config.json", "model.safetensors", "training.safetensors"} - meta["sha256"].keys():
        raise _refused(path, f"{path / 'training.json'} lacks the hash of {', '.join(sorted(missing))}")
    files = _read(path, meta["sha256"])
    try:
        model = load_model(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _refused(path, str(error)) from error
    return model, load_tensors(files["training.safetensors"]), meta


def restore(
    model: LM, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> list[LMState | None]:
    """Restore optimizer and random state, and return the lane states."""
    torch.set_rng_state(tensors["rng"])
    by_name = dict(model.named_parameters())
    for key, x in tensors.items():
        if key.startswith("optimizer."):
            name, part = key.removeprefix("optimizer.").rsplit(".", 1)
            optimizer.state[by_name[name]][part] = x
    states: list[LMState | None] = []
    for lane, (there, rows) in enumerate(zip(meta["lanes"], meta["rows"], strict=True)):
        prefix = f"lanes.{lane}."
        mine = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        states.append(model.initial(rows).detach().with_tensors(mine) if there else None)
    return states
