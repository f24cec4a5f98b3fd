"""Models on disk: Hugging Face folders with `config.json` and `model.safetensors`, written
atomically."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from miras.nn.config import ModelConfig
from miras.nn.lm import LM
from miras.store.checksums import read_checked, with_checksums
from miras.store.files import naming, place_folder

MODEL_TYPE = "miras"
ARCHITECTURE = "MirasForCausalLM"
OF_TRANSFORMERS = frozenset(
    {
        *("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
        *("return_dict", "use_cache", "output_attentions", "output_hidden_states", "is_encoder_decoder"),
        *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "name_or_path", "_name_or_path"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "tokenizer_class"),
    }
)
"""Fields of a config.json that only `transformers` reads."""

CODE = {
    "modeling_miras.py": b'''"""The classes of this model; they come with the package miras-torch."""

try:
    from miras.hf import MirasConfig, MirasForCausalLM, MirasForSequenceClassification, MirasModel
except ImportError as error:
    raise ImportError("this model needs the package miras-torch; install it with pip") from error

__all__ = ["MirasConfig", "MirasForCausalLM", "MirasForSequenceClassification", "MirasModel"]
'''
}
"""The module saved beside every model, for tools that do not import `miras` and load with
`trust_remote_code=True`."""

AUTO_MAP = {
    "AutoConfig": "modeling_miras.MirasConfig",
    "AutoModel": "modeling_miras.MirasModel",
    "AutoModelForCausalLM": "modeling_miras.MirasForCausalLM",
    "AutoModelForSequenceClassification": "modeling_miras.MirasForSequenceClassification",
}
"""Where `transformers` finds a model's classes in that module."""


def save_model(model: LM, folder: str | Path, extra: dict[str, bytes] | None = None) -> Path:
    """Write a model as a folder, atomically, with `extra` files beside it. An older folder is
    replaced.

    Raises ValueError if the target exists and is not a model folder, and OSError, naming it, if it
    cannot be written; an older folder then remains.
    """
    return write_folder(Path(folder), model_files(model) | (extra or {}))


def model_files(model: LM) -> dict[str, bytes]:
    """The files of a model's folder, by name."""
    known = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "auto_map": AUTO_MAP}
    config = known | model.config.to_dict()
    stored = weights(model)
    return {
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "model.safetensors": _saved(stored),
        **CODE,
    }


def _saved(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file with its checksum in the metadata; the same tensors give the same bytes.

    safetensors writes metadata in arbitrary order; here it is sorted, in the same space.
    """
    data = save(tensors, metadata={"format": "pt", "sha256": _digest(tensors)})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    sorted_header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + sorted_header.ljust(size) + data[8 + size :]


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Write a folder of files atomically, replacing an older model; raises like `save_model`."""
    with naming(folder):
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
            raise ValueError(f"{folder} exists and is not a model folder; choose another folder or empty it")
    place_folder(folder, with_checksums(files))
    return folder


def load_model(folder: str | Path, *, trust_remote_code: bool = False) -> LM:
    """Load the model in a folder. Raises FileNotFoundError or ValueError, naming what is missing or
    does not fit.

    `trust_remote_code` allows the config to name classes and functions outside miras, which are
    imported and run.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not a model: {name} is missing; a model is a folder with config.json and "
                f"model.safetensors, as written by `miras train`"
            )
    config = read_config(folder, trust_remote_code=trust_remote_code)
    kinds = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    if kinds and kinds != [ARCHITECTURE]:
        held = " and ".join(map(str, kinds)) if isinstance(kinds, list) else kinds
        raise ValueError(f"{folder} holds a {held}, not a language model ({ARCHITECTURE})")
    file = folder / "model.safetensors"
    file.open("rb").close()  # safetensors reports an unreadable file as missing
    try:
        with safe_open(file, "pt") as opened:
            told = opened.metadata() or {}
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            # Sizes are trusted only if the file has them: nothing is allocated before.
            if config.num_hidden_layers > len(shapes):
                raise ValueError(
                    f"{folder}: the weights do not fit config.json: it has {config.num_hidden_layers} layers, "
                    f"{file.name} only {len(shapes)} tensors"
                )
            with torch.device("meta"):
                _check_shapes(folder, LM(config), shapes)
        stored = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt or truncated: {error}") from error
    if "sha256" in told and _digest(stored) != told["sha256"]:  # files from other tools have none
        raise ValueError(
            f"{file} is corrupt: its checksum differs: a byte has changed since it was saved (a tool that changes "
            f"weights must not keep the `sha256` of the metadata)"
        )
    model = LM(config)
    model.load_state_dict(stored, strict=not model.config.tie_word_embeddings)
    return model


def _check_shapes(folder: Path, model: LM, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless a file's tensors are those of a model."""
    expected = {name: tuple(x.shape) for name, x in weights(model).items()}
    wrong = [n for n in expected if shapes.get(n) != expected[n]]
    if wrong or len(shapes) != len(expected):
        surplus = sorted(set(shapes) - set(expected))
        raise ValueError(
            f"{folder}: the weights do not fit config.json: missing or of another shape {wrong[:5]}, "
            f"not expected {surplus[:5]}"
        )


def read_config(folder: str | Path, *, trust_remote_code: bool = False) -> ModelConfig:
    """The config of a model folder. Raises FileNotFoundError, or ValueError if `config.json` is not
    ours."""
    path = Path(folder) / "config.json"
    try:
        data = read_checked(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is not a model: it has no config.json") from error
    try:
        values: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{path} does not describe a miras model (its model_type is not {MODEL_TYPE!r})")
    values = {n: x for n, x in values.items() if n not in OF_TRANSFORMERS}
    try:
        return ModelConfig.from_dict(values, trust_remote_code=trust_remote_code)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} does not describe a valid model: {said}") from error


def weights(model: LM) -> dict[str, Tensor]:
    """The tensors in a model's file; tied ones once."""
    found = {n: x.detach().contiguous() for n, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def model_hash(model: LM) -> str:
    """16 hexadecimal digits that identify a model by its config and weights, independent of its
    path."""
    return _digest(weights(model), json.dumps(model.config.to_dict(), sort_keys=True))[:16]


def _digest(tensors: dict[str, Tensor], before: str = "") -> str:
    """SHA-256 of a text, followed by names and bytes of tensors."""
    digest = hashlib.sha256(before.encode())
    for name, x in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
