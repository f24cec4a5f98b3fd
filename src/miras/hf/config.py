"""The config of a model for `transformers`."""

from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from miras.nn.config import KNOWN, ModelConfig
from miras.nn.folder import AUTO_MAP, CODE, MODEL_TYPE, OF_TRANSFORMERS
from miras.store.checksums import CHECKSUMS
from miras.store.files import write_atomically

trusting: ContextVar[bool] = ContextVar("trusting", default=False)
"""Whether a model is being loaded with `trust_remote_code=True`."""


class MirasConfig(PreTrainedConfig):
    """A `ModelConfig` for `transformers`: the entries of `ModelConfig.to_dict` as attributes.

    Missing fields have the defaults of `ModelConfig`; `MirasConfig.of(miras.preset(...))` makes one
    from a preset. Code named by import path runs only if loaded with `trust_remote_code=True`.
    Raises ValueError for fields that neither side knows.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}

    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in _NAMES if name in kwargs}
        unknown = [n for n in kwargs if n not in OF_TRANSFORMERS | _OPTIONS and not n.startswith("_")]
        if unknown:
            raise ValueError(
                f"MirasConfig: unknown fields {', '.join(unknown)}; known are {', '.join(_NAMES)} and those of "
                f"transformers; a newer miras may know more"
            )
        usual = {} if given.get("format_version") == 1 else ModelConfig().to_dict()
        for name, value in (usual | given).items():
            setattr(self, name, value)
        super().__post_init__(**kwargs)
        self._trusted = False  # regardless of the file

    @classmethod
    def of(cls, config: ModelConfig, **kwargs: Any) -> Self:
        """The same model's config here; `kwargs` are fields that only `transformers` has."""
        made = cls(**config.to_dict(), **kwargs)
        made._trusted = True  # its parts are already objects of this process
        return made

    def model_config(self) -> ModelConfig:
        """The config for `miras.LM`. Raises ValueError if it does not describe a model."""
        self._trusted = self._trusted or trusting.get()
        plain = {name: getattr(self, name) for name in _NAMES if hasattr(self, name)}
        return ModelConfig.from_dict(plain, trust_remote_code=self._trusted)

    @classmethod
    def from_pretrained(cls, *args: Any, trust_remote_code: bool | None = None, **kwargs: Any) -> Any:
        """As in `transformers`; `trust_remote_code` allows the config to name code to import and
        run."""
        found = super().from_pretrained(*args, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config._trusted = bool(trust_remote_code)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with where `trust_remote_code=True` finds the classes."""
        plain = super().to_dict()
        plain.pop("_trusted", None)
        return plain | {"auto_map": AUTO_MAP}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in `transformers`, with the module that `trust_remote_code=True` loads."""
        for name, data in CODE.items():
            write_atomically(Path(save_directory) / name, data)
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / CHECKSUMS).unlink(missing_ok=True)  # those of files from before

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: every saved config names its classes, and their source stays in the
        package."""


_NAMES = ("format_version", *KNOWN)
_OPTIONS = {"num_labels", "attn_implementation", "experts_implementation", "quantization_config"}
"""Further fields that `transformers` accepts."""
