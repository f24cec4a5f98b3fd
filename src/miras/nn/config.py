"""The config of a model: one frozen value that can be written to `config.json` and read back."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miras.core.rule import Rule
from miras.nn.memory import MemoryConfig, memories_in
from miras.nn.mlp import SwiGLUConfig
from miras.nn.part import MixerConfig, MLPConfig, Sizes, check_sizes
from miras.nn.plain import KINDS, fields, hints_of, made, read
from miras.store.words import nearest

FORMAT_VERSION = 2
"""Format version of `ModelConfig.to_dict`; older ones stay readable."""

AXES: dict[str, type] = {name: kind for name, kind in hints_of(Rule).items() if kind in KINDS}
"""The choices of a rule, by the names of its fields."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Sizes):
    """A language model of pre-norm residual blocks, each a token mixer and an MLP.

    pattern: the mixers of the layers, repeated to num_hidden_layers: `AttentionConfig`,
    `MemoryConfig`, `MACConfig`, `MAGConfig`, `MALConfig` (memory as context, as gate, as layer), or
    your own. mlp: the MLP after each mixer, or None. The other fields are those of `Sizes`. Raises
    ValueError for sizes that do not fit.
    """

    vocab_size: int = 256
    num_hidden_layers: int = 4
    pattern: tuple[MixerConfig, ...] = (MemoryConfig(),)
    mlp: MLPConfig | None = SwiGLUConfig()
    tie_word_embeddings: bool = False
    source: Mapping[str, Any] | None = field(default=None, init=False, repr=False, compare=False)
    """The dictionary of an earlier format that it was read from. `to_dict` returns it, so that the
    model keeps the hash by which its states know it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, vocab_size=1, num_hidden_layers=1)
        if not isinstance(self.pattern, tuple) or not all(isinstance(x, MixerConfig) for x in self.pattern):  # pyright: ignore
            raise ValueError(
                f"ModelConfig: pattern must be a tuple of mixers, such as (MAGConfig(),), got {self.pattern!r}; "
                f"miras.preset(NAME, pattern=(...)) also takes their names, {_mixers()}"
            )
        if not self.pattern:
            raise ValueError(f"ModelConfig: pattern must name one or more of {_mixers()}; got ()")
        if reason := next((reason for each in self.pattern if (reason := each.refusal(self))), None):
            raise ValueError(f"ModelConfig: {reason}")
        if self.mlp is None and self.intermediate_size is not None:
            raise ValueError(
                f"ModelConfig: intermediate_size is the width inside an MLP, and this model has mlp=None; omit "
                f"intermediate_size={self.intermediate_size}"
            )

    def mixer(self, layer: int) -> MixerConfig:
        """The mixer of one layer."""
        return self.pattern[layer % len(self.pattern)]

    def mixers(self) -> list[MixerConfig]:
        """The mixer of each layer."""
        return [self.mixer(layer) for layer in range(self.num_hidden_layers)]

    def memories(self) -> list[MemoryConfig]:
        """The memories in the pattern, in its order."""
        return [memory for each in self.pattern for memory in memories_in(each)]

    def inner(self) -> int:
        """The width inside the MLP, 0 without one."""
        return 0 if self.mlp is None else self.mlp.width(self)

    def stride(self) -> int:
        """Number of tokens after which no chunk or segment is open in any layer."""
        return math.lcm(*(each.stride() for each in self.mixers()))

    def grows(self) -> bool:
        """Whether the state grows with every token: some layer has full attention."""
        return any(each.grows() for each in self.mixers())

    def flops_per_token(self) -> int:
        """FLOPs of one token's forward pass: 2 per multiply-add of matrices, not counting
        caches."""
        mlp = 0 if self.mlp is None else self.mlp.flops(self)
        layers = sum(each.flops(self) + mlp for each in self.mixers())
        return 2 * self.hidden_size * self.vocab_size + layers

    def unread(self, names: Mapping[str, Any]) -> str | None:
        """The reason to refuse settings that no part of the model has, or None."""
        own = {*hints_of(ModelConfig)}.union(*(each.names() for each in self.pattern))
        for name in names:
            if name in own:
                continue
            readers = [n for n, kind in KINDS[MixerConfig].items() if name in kind().names()]
            here = ", ".join(dict.fromkeys(each.name for each in self.pattern))
            if readers:
                return (
                    f"{name} is only used by layers of {', '.join(readers)}, and this model has {here}; omit "
                    f"it, or choose a model or a pattern with such layers"
                )
            return f"unknown field {name!r}{nearest(name, own)}; known are {', '.join(sorted(own))}"
        return None

    def changed(self, values: Mapping[str, Any]) -> "ModelConfig":
        """The config with settings changed, each in the parts of the model that have it.

        A mixer named in `pattern` is the one that the model has, or is made with the fields of its
        mixers.
        """
        like = [part for each in self.pattern for part in each.walk()]
        pattern: list[MixerConfig] = []
        for each in values.get("pattern", self.pattern):
            if isinstance(each, MixerConfig):
                pattern.append(each.changed(values))
                continue
            kind = KINDS[MixerConfig].get(each)
            if kind is None:
                raise ValueError(
                    f"ModelConfig: pattern must name one or more of {_mixers()}; got {values['pattern']!r}"
                )
            there = next((part for part in like if type(part) is kind), kind())
            pattern.append(there.changed(values, like))
        own = {name: value for name, value in values.items() if name in hints_of(ModelConfig)}
        return dataclasses.replace(self, **own | {"pattern": tuple(pattern)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back to an equal config.

        A choice from outside the library is written by its import path and dataclass fields. Raises
        ValueError if that is impossible: not a dataclass, or a function that cannot be imported by
        name.
        """
        return (
            {"format_version": FORMAT_VERSION, **fields(self)} if self.source is None else dict(self.source)
        )

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, trust_remote_code: bool = False) -> "ModelConfig":
        """The config that `to_dict` wrote. Raises ValueError for unknown names or a newer format.

        `trust_remote_code` allows importing and running what it names by import path. Without it
        only the library's choices and the functions in `miras.nn.plain.FUNCTIONS` are allowed.
        """
        plain = dict(values)
        version = plain.pop("format_version", None)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"ModelConfig: format version {version!r} is unknown; this miras reads up to {FORMAT_VERSION}; "
                f"upgrade miras to read it"
            )
        if version == FORMAT_VERSION:
            return made(ModelConfig, plain, trust_remote_code)
        # Format 1 had the settings of all mixers side by side, the same for all layers, used or
        # not.
        if unknown := sorted(set(plain) - set(KNOWN)):
            raise ValueError(
                f"ModelConfig: unknown fields {', '.join(unknown)}; known are {', '.join(KNOWN)}"
            )
        hints = hints_of(ModelConfig) | hints_of(MemoryConfig) | {"pattern": Any}
        flat = {n: read(hints.get(n, Any), each, trust_remote_code, n) for n, each in plain.items()}
        config = ModelConfig().changed(flat)
        object.__setattr__(config, "source", dict(values))
        return config


KNOWN = tuple(
    dict.fromkeys(
        [*hints_of(ModelConfig), *(n for kind in KINDS[MixerConfig].values() for n in sorted(kind().names()))]
    )
)
"""The fields of a config of any format."""


def _mixers() -> str:
    return ", ".join(KINDS[MixerConfig])
