"""Models on disk: Hugging Face folders with `config.json` and `model.safetensors`, written atomically."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from miras.nn.config import ModelConfig
from miras.nn.lm import LM

MODEL_TYPE = "miras"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, even when the machine stops in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """What this process takes off new files' modes; temporary files are made private and must get them back."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_model(model: LM, folder: str | Path, extra: dict[str, bytes] | None = None) -> Path:
    """Write a model as a folder, whole or not at all; `extra` files go beside it. An older folder is replaced.

    Raises ValueError when the target exists and does not hold a model.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder} exists and holds no model; choose another folder or empty it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        config = {"model_type": MODEL_TYPE, "architectures": ["MirasForCausalLM"], **model.config.to_dict()}
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights(model), made / "model.safetensors", metadata={"format": "pt"})
        for name, data in (extra or {}).items():
            (made / name).write_bytes(data)
        made.chmod(0o777 & ~_umask())
        old = None
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        made.rename(folder)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return folder


def load_model(folder: str | Path) -> LM:
    """The model of a folder. Raises FileNotFoundError or ValueError naming what is missing or does not fit."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not a model: {name} is missing; a model is a folder with config.json and "
                f"model.safetensors, as `miras train` writes it"
            )
    model = LM(read_config(folder))
    try:
        stored = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} is corrupt or cut off: {error}") from error
    expected = weights(model)
    wrong = [n for n in expected if n not in stored or stored[n].shape != expected[n].shape]
    if wrong or len(stored) != len(expected):
        surplus = sorted(set(stored) - set(expected))
        raise ValueError(
            f"{folder}: the weights do not fit config.json: missing or of another shape {wrong[:5]}, "
            f"not expected {surplus[:5]}"
        )
    model.load_state_dict(stored, strict=not model.config.tie_word_embeddings)
    return model


def read_config(folder: str | Path) -> ModelConfig:
    """The config of a model folder. Raises ValueError when `config.json` is not one of ours."""
    path = Path(folder) / "config.json"
    try:
        values: Any = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{path} does not describe a miras model (its model_type is not {MODEL_TYPE!r})")
    values = {n: x for n, x in values.items() if n not in ("model_type", "architectures")}
    try:
        return ModelConfig.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a model that can be made: {error}") from error


def weights(model: LM) -> dict[str, Tensor]:
    """The tensors that a model's file holds; tied ones once."""
    found = {n: x.detach().contiguous() for n, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def model_hash(model: LM) -> str:
    """16 hexadecimal digits that name a model: config and weights, independent of where they are."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, x in sorted(weights(model).items()):
        digest.update(name.encode())
        digest.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
