"""Checkpoints that hold everything a run needs to go on as if it had not stopped.

A checkpoint is a model folder (config.json, model.safetensors) with `training.safetensors` (optimizer, lane
states, random state) and `training.json` (step, task, options, a hash of each file).
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from miras.nn.folder import load_model, save_model
from miras.nn.lm import LM, LMState

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
    """Write the checkpoint of `meta["step"]`, whole or not at all, and drop all but the newest `keep`."""
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    names = {id(p): name for name, p in model.named_parameters()}
    for p, values in optimizer.state.items():
        tensors |= {f"optimizer.{names[id(p)]}.{key}": torch.as_tensor(x) for key, x in values.items()}
    for lane, state in enumerate(states):
        if state is not None:
            tensors |= {f"lanes.{lane}.{name}": x.detach() for name, x in state.tensors().items()}
    data = save_tensors({n: x.contiguous().clone() for n, x in tensors.items()})
    meta = {
        "format_version": FORMAT_VERSION,
        **meta,
        "lanes": [state is not None for state in states],
        "rows": [0 if state is None else state.tokens.shape[0] for state in states],
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    files = extra | {"training.safetensors": data, "training.json": json.dumps(meta, indent=2).encode()}
    path = save_model(model, folder / f"step-{meta['step']}", files)
    for old in checkpoints(folder)[: -max(1, keep)]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path) -> tuple[LM, dict[str, Tensor], dict[str, Any]]:
    """The model, the training tensors and the meta data of a checkpoint. ValueError names a corrupt file."""
    model = load_model(path)
    try:
        meta = json.loads((path / "training.json").read_text())
        data = (path / "training.safetensors").read_bytes()
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error}") from error
    if meta.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: checkpoint format {meta.get('format_version')!r}, this version of miras reads {FORMAT_VERSION}"
        )
    if hashlib.sha256(data).hexdigest() != meta["sha256"]:
        raise ValueError(
            f"{path / 'training.safetensors'} is corrupt: its hash is not the one that was saved"
        )
    return model, load_tensors(data), meta


def restore(
    model: LM, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> list[LMState | None]:
    """Put optimizer and random state back, and return the lane states."""
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
