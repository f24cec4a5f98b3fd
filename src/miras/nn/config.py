"""What a model is made of, as one frozen value that can be written to `config.json` and read back."""

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from miras.core.algorithm import ALGORITHMS
from miras.core.bias import BIASES
from miras.core.memory import MEMORIES
from miras.core.retention import RETENTIONS
from miras.core.rule import Rule
from miras.core.typed import Typed
from miras.nn.gates import Gate, forget_refusal, unread
from miras.nn.memory import TITANS_FEATURES, TITANS_RULE, Features

FORMAT_VERSION = 1
"""Version of the dictionaries that `ModelConfig.to_dict` writes; older ones stay readable."""

LARGEST = 2**31 - 1
"""No size is larger: those of tensors are products of a few."""

AXES: dict[str, tuple[type, ...]] = {
    "memory": MEMORIES,
    "bias": BIASES,
    "retention": RETENTIONS,
    "algorithm": ALGORITHMS,
}
"""Every choice on every axis, by axis."""

FIRST_WRITTEN = {
    "MLP": ("depth", "expansion", "residual", "norm"),
    "Decay": ("decayed",),
    "GradientDescent": ("momentum", "step_bound"),
    "Gate": ("link", "scale", "bias", "per_weight"),
    "ModelConfig": (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_heads",
        "head_dim",
        "intermediate_size",
        "pattern",
        "rule",
        "gates",
        "conv_size",
        "initial_scale",
        "window_size",
        "num_persistent",
        "rope_theta",
        "norm_eps",
        "tie_word_embeddings",
    ),
}
"""Fields that are written whatever they hold, by class; others only where they differ from their default. So what a
model is called, the hash of its config, does not change when a class gets a new field."""


def segment_refusal(segment_size: int, chunk_size: int, pool: int) -> str | None:
    """Why segments of that size cannot be cut into chunks and pools, or None."""
    if segment_size < 1 or segment_size % chunk_size:
        return (
            f"segment_size must be a multiple of chunk_size {chunk_size}, got {segment_size}; a segment reads the "
            f"memory as it stands where a chunk ends"
        )
    if pool < 1 or segment_size % pool:
        return f"pool must divide segment_size {segment_size}, got {pool}"
    return None


READERS: dict[str, tuple[str, ...]] = {
    "chunk_size": ("memory", "mac", "mag", "mal"),
    "window_size": ("attention", "mag", "mal"),
    "num_persistent": ("attention", "mac", "mag", "mal"),
    "segment_size": ("mac",),
    "pool": ("mac",),
}
"""Which mixers read a size; all read the others."""


def unread_sizes(pattern: tuple[str, ...], given: Iterable[str]) -> str | None:
    """Which of the given sizes no layer of a pattern reads, as a reason to refuse them, or None."""
    for name in given:
        readers = READERS.get(name, pattern)
        if not set(readers) & set(pattern):
            return (
                f"{name} is read by layers of {', '.join(readers)} only, and this model has {', '.join(pattern)}; "
                f"leave it out, or choose a model or a pattern with such layers"
            )
    return None


MAG_GATES = ("silu", "sigmoid")
"""What memory as gate may apply to its normed read."""

MIXERS = ("attention", "memory", "mac", "mag", "mal")
"""What a layer may be made of."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Typed):
    """A language model of pre-norm blocks, each a token mixer and a SwiGLU.

    pattern: mixers of the layers, repeated to num_hidden_layers: "attention", "memory" (a MemoryLayer), "mac",
    "mag", "mal" (memory as context, as gate, as layer). head_dim defaults to hidden_size / num_heads,
    intermediate_size to 8/3 hidden_size rounded up to 16. rule: the memory's four choices; gates: how its gates are
    made where that differs from the defaults, by name or by name.weight for one weight of the memory; features: how
    its queries and keys are made; conv_size: taps behind its projections; initial_scale: deviation of the initial
    memory times sqrt(d_in).
    mag_gate: "silu" or "sigmoid", how memory as gate lets attention through (Titans 4.2 leaves it open).
    window_size: tokens of sliding-window attention, None for full; segment_size: tokens of a segment of memory as
    context, a multiple of the rule's chunk_size; pool: tokens of a segment that share one memory token;
    num_persistent: persistent tokens. Raises ValueError for sizes that do not fit.
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
    features: Features = TITANS_FEATURES
    mag_gate: str = "silu"
    window_size: int | None = None
    segment_size: int = 512
    pool: int = 1
    num_persistent: int = 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, tuple) or not isinstance(self.gates, Mapping):  # pyright: ignore
            raise ValueError(
                f"ModelConfig: pattern must be a tuple of names, such as ('mac',), and gates a mapping from names to "
                f"Gate(...), got {self.pattern!r} and {self.gates!r}"
            )
        if not isinstance(self.rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"ModelConfig: rule must be a Rule(...), got {self.rule!r}")
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in [*sizes.items(), ("chunk_size", self.rule.chunk_size)]:
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"ModelConfig: {name} must be at most {LARGEST}, got {value}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"ModelConfig: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; "
                f"change one of them or give head_dim"
            )
        if self.mag_gate not in MAG_GATES:
            raise ValueError(
                f"ModelConfig: mag_gate must be one of {', '.join(MAG_GATES)}, got {self.mag_gate!r}"
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
            ("conv_size", 0),
            ("initial_scale", 0),
            ("norm_eps", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"ModelConfig: {name} must be at least {low}, got {value}")
        if "mac" in self.pattern and (
            reason := segment_refusal(self.segment_size, self.rule.chunk_size, self.pool)
        ):
            raise ValueError(f"ModelConfig: {reason}")
        attends = any(name != "memory" for name in self.pattern)
        if (attends or self.features.rotary) and self.width() % 2:
            raise ValueError(f"ModelConfig: rotary positions need an even head width, got {self.width()}")
        if self.rope_theta <= 0:
            raise ValueError(f"ModelConfig: rope_theta must be above 0, got {self.rope_theta}")
        if reason := unread(self.rule, self.gates):
            raise ValueError(f"ModelConfig: {reason}")
        if reason := forget_refusal(self.rule, self.gates):
            raise ValueError(f"ModelConfig: {reason}")

    def width(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    def inner(self) -> int:
        """The width inside the SwiGLU."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-(8 * self.hidden_size // 3) // 16) * 16

    def stride(self) -> int:
        """Tokens after which nothing is half read: a chunk, or a segment where memory is context."""
        return self.segment_size if "mac" in self.pattern else self.rule.chunk_size

    def grows(self) -> bool:
        """Whether a stream's state grows with every token: some layer has attention without a window."""
        layers = {self.mixer(layer) for layer in range(self.num_hidden_layers)}
        return self.window_size is None and not layers.isdisjoint(("attention", "mag", "mal"))

    def mixer(self, layer: int) -> str:
        """The name of a layer's mixer."""
        return self.pattern[layer % len(self.pattern)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON; `from_dict` reads them back to an equal config.

        A choice that is not one of the library's is written by its import path, with its dataclass fields. Raises
        ValueError where that cannot be: no dataclass, or a function without a name of its own.
        """
        plain = _written(self, "ModelConfig")
        plain["pattern"] = list(self.pattern)
        plain["gates"] = {name: _written(gate, "Gate") for name, gate in self.gates.items()}
        axes = {axis: _named(axis, getattr(self.rule, axis)) for axis in AXES}
        plain["rule"] = {**axes, "chunk_size": self.rule.chunk_size}
        if "features" in plain:
            plain["features"] = _written(self.features, "Features")
        return {"format_version": FORMAT_VERSION, **plain}

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, trust_remote_code: bool = False) -> "ModelConfig":
        """The config that `to_dict` wrote. Raises ValueError for unknown names or a newer format.

        `trust_remote_code` allows it to import and run what it names by import path. Without it, choices are the
        library's own, and functions those of `FUNCTIONS`.
        """
        plain = dict(values)
        version = plain.pop("format_version", None)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"ModelConfig: format version {version!r} is unknown; this miras reads up to {FORMAT_VERSION}; "
                f"upgrade miras to read it"
            )
        known = {f.name for f in dataclasses.fields(ModelConfig)}
        if unknown := sorted(set(plain) - known):
            raise ValueError(
                f"ModelConfig: unknown fields {', '.join(unknown)}; known are {', '.join(known)}"
            )
        plain["pattern"] = tuple(plain["pattern"])
        plain["gates"] = {name: Gate(**gate) for name, gate in plain["gates"].items()}
        plain["features"] = Features(**plain.get("features", {}))
        rule = plain["rule"]
        parts = {axis: _built(axis, rule[axis], trust_remote_code) for axis in AXES}
        plain["rule"] = Rule(**parts, chunk_size=rule["chunk_size"])
        return ModelConfig(**plain)


def _written(part: Any, kind: str) -> dict[str, Any]:
    """The fields of a dataclass that are written, as plain values."""
    always = FIRST_WRITTEN.get(kind, ())
    found: dict[str, Any] = {}
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if f.init and (f.name in always or value != default):
            found[f.name] = {"function": _path(value)} if callable(value) else value
    return found


def _named(axis: str, part: Any) -> dict[str, Any]:
    kind = type(part)
    name = kind.__name__ if kind in AXES[axis] else _path(kind)
    if not dataclasses.is_dataclass(part):
        raise ValueError(
            f"ModelConfig: {axis} {part!r} cannot be written: make {kind.__name__} a frozen dataclass"
        )
    return {"name": name, **_written(part, name)}


def _built(axis: str, values: Mapping[str, Any], trusted: bool) -> Any:
    options = dict(values)
    name = options.pop("name")
    kinds = {kind.__name__: kind for kind in AXES[axis]}
    if name not in kinds and ":" not in name:
        raise ValueError(f"ModelConfig: unknown {axis} {name!r}; known are {', '.join(kinds)}")
    kind = kinds[name] if name in kinds else _imported(name, trusted)
    base = AXES[axis][0].__base__
    assert base is not None
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"ModelConfig: {axis} {name!r} is not a subclass of {base.__name__}")
    for field_name, value in options.items():
        if isinstance(value, Mapping) and set(value) == {"function"}:
            options[field_name] = _function(value["function"], trusted)
    return kind(**options)


TORCH: dict[str, Any] = {"torch": torch, "torch.nn.functional": F}
"""Modules whose functions are written by the name they have there."""

FUNCTIONS = frozenset(
    {
        *(f"torch:{n}" for n in ("exp", "exp2", "expm1", "sinh", "asinh", "atan", "erf")),
        *(f"torch:{n}" for n in ("celu", "relu", "selu", "sigmoid", "tanh")),
        *(f"torch.nn.functional:{n}" for n in ("celu", "elu", "gelu", "leaky_relu", "mish")),
        *(f"torch.nn.functional:{n}" for n in ("relu", "selu", "sigmoid", "silu", "softplus", "softsign")),
        *(f"torch.nn.functional:{n}" for n in ("hardsigmoid", "hardtanh", "tanh", "tanhshrink")),
    }
)
"""Functions that a config may name without being trusted: of one tensor, elementwise, and of nothing else."""


def _path(thing: Any) -> str:
    """The import path "package.module:Name" of a class or a function. Raises ValueError where it has none."""
    name = getattr(thing, "__qualname__", "")
    for module, home in TORCH.items():
        if name and getattr(home, thing.__name__, None) is thing:
            return f"{module}:{thing.__name__}"
    path = f"{getattr(thing, '__module__', None)}:{name}"
    try:
        found = _imported(path, True)
    except ValueError:
        found = None
    if found is not thing:
        raise ValueError(
            f"ModelConfig: {thing!r} cannot be written by its import path {path}: define it by name at the top level "
            f"of a module"
        )
    return path


def _function(path: str, trusted: bool) -> Any:
    if path in FUNCTIONS:
        module, _, name = path.partition(":")
        return getattr(TORCH[module], name)
    return _imported(path, trusted)


def _imported(path: str, trusted: bool) -> Any:
    """What an import path names. Raises ValueError when that is not allowed, or not there."""
    if not trusted:
        raise ValueError(
            f"ModelConfig: this config names code to import and run, {path}, that is not part of miras; if you trust "
            f"it, read it with trust_remote_code=True (--trust-remote-code on the command line)"
        )
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        way = "install the package that has it, or put its module on the Python path"
        if module == "__main__":
            way = "it was defined in a script or a notebook: move it to a module, and make and save the model again"
        raise ValueError(f"ModelConfig: {path} cannot be imported ({error}); {way}") from error
    return found
