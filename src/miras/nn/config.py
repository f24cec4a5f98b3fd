"""What a model is made of, as one frozen value that can be written to `config.json` and read back."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miras.core.algorithm import ALGORITHMS
from miras.core.bias import BIASES
from miras.core.memory import MEMORIES
from miras.core.retention import RETENTIONS
from miras.core.rule import Rule
from miras.nn.gates import Gate
from miras.nn.memory import TITANS_RULE

FORMAT_VERSION = 1
"""Version of the dictionaries that `ModelConfig.to_dict` writes; older ones stay readable."""

AXES = {"memory": MEMORIES, "bias": BIASES, "retention": RETENTIONS, "algorithm": ALGORITHMS}
"""Every choice on every axis, by axis."""

MIXERS = ("attention", "memory", "mag")
"""What a layer may be made of."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model of pre-norm blocks, each a token mixer and a SwiGLU.

    pattern: mixers of the layers, repeated to num_hidden_layers: "attention", "memory" (a MemoryLayer), "mag"
    (memory as gate). head_dim defaults to hidden_size / num_heads, intermediate_size to 8/3 hidden_size rounded
    up to 16. rule: the memory's four choices; gates: how its gates are made where that differs from the
    defaults; conv_size: taps behind the memory's projections; initial_scale: deviation of the initial memory
    times sqrt(d_in). window_size: tokens of sliding-window attention, None for full; num_persistent: persistent
    tokens. Raises ValueError for sizes that do not fit.
    """

    vocab_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_heads: int = 4
    head_dim: int | None = None
    intermediate_size: int | None = None
    pattern: tuple[str, ...] = ("memory",)
    rule: Rule = TITANS_RULE
    gates: Mapping[str, Gate] = field(default_factory=dict[str, Gate])
    conv_size: int = 4
    initial_scale: float = 1.0
    window_size: int | None = None
    num_persistent: int = 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"ModelConfig: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; "
                f"change one of them or give head_dim"
            )
        unknown = [name for name in self.pattern if name not in MIXERS]
        if unknown or not self.pattern:
            raise ValueError(
                f"ModelConfig: pattern must name one or more of {', '.join(MIXERS)}; got {self.pattern!r}"
            )
        for name, low in (
            ("window_size", 1),
            ("intermediate_size", 1),
            ("head_dim", 1),
            ("num_persistent", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"ModelConfig: {name} must be at least {low}, got {value}")
        if any(name in ("attention", "mag") for name in self.pattern) and self.width() % 2:
            raise ValueError(f"ModelConfig: rotary positions need an even head width, got {self.width()}")
        unread = [name for name in self.gates if name not in self.rule.gates()]
        if unread:
            raise ValueError(
                f"ModelConfig: gates {', '.join(unread)} are not read by this rule, which reads "
                f"{', '.join(self.rule.gates())}"
            )

    def width(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    def inner(self) -> int:
        """The width inside the SwiGLU."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-(8 * self.hidden_size // 3) // 16) * 16

    def mixer(self, layer: int) -> str:
        """The name of a layer's mixer."""
        return self.pattern[layer % len(self.pattern)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON; `from_dict` reads them back to an equal config."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["pattern"] = list(self.pattern)
        plain["gates"] = {name: dataclasses.asdict(gate) for name, gate in self.gates.items()}
        axes = {axis: _named(getattr(self.rule, axis)) for axis in AXES}
        plain["rule"] = {**axes, "chunk_size": self.rule.chunk_size}
        return {"format_version": FORMAT_VERSION, **plain}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "ModelConfig":
        """The config that `to_dict` wrote. Raises ValueError for unknown names or a newer format."""
        plain = dict(values)
        version = plain.pop("format_version", None)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"ModelConfig: format version {version!r} is not known here (up to {FORMAT_VERSION}); "
                f"upgrade miras to read it"
            )
        known = {f.name for f in dataclasses.fields(ModelConfig)}
        if unknown := sorted(set(plain) - known):
            raise ValueError(
                f"ModelConfig: unknown fields {', '.join(unknown)}; known are {', '.join(known)}"
            )
        plain["pattern"] = tuple(plain["pattern"])
        plain["gates"] = {name: Gate(**gate) for name, gate in plain["gates"].items()}
        rule = plain["rule"]
        parts = {axis: _built(axis, rule[axis]) for axis in AXES}
        plain["rule"] = Rule(**parts, chunk_size=rule["chunk_size"])
        return ModelConfig(**plain)


def _named(part: Any) -> dict[str, Any]:
    return {"name": type(part).__name__, **dataclasses.asdict(part)}


def _built(axis: str, values: Mapping[str, Any]) -> Any:
    options = dict(values)
    name = options.pop("name")
    kinds = {kind.__name__: kind for kind in AXES[axis]}
    if name not in kinds:
        raise ValueError(f"ModelConfig: unknown {axis} {name!r}; known are {', '.join(kinds)}")
    return kinds[name](**options)
