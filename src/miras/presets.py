"""Named models: each a point of the design space and its own parameterisation. Data, no logic."""

import dataclasses
import difflib
from typing import Any

import torch

from miras.core.algorithm import GradientDescent
from miras.core.memory import MLP
from miras.core.rule import Rule
from miras.nn.config import ModelConfig
from miras.nn.gates import Gate
from miras.nn.lm import LM

TITANS = {
    "rule": Rule(memory=MLP(), algorithm=GradientDescent(momentum=True, step_bound=10.0), chunk_size=16),
    "gates": {
        "lr": Gate(scale=0.25, per_weight=True),
        "momentum": Gate(scale=0.9, per_weight=True),
        "forget": Gate(bias=-5.0, per_weight=True),
    },
}
"""Titans' memory: deep, momentum, forgetting, a gate for each of its weights (NeurIPS version, 3 and App. B.3)."""

PRESETS: dict[str, dict[str, Any]] = {
    "transformer": {"pattern": ("attention",)},
    "titans-lmm": {"pattern": ("memory",), **TITANS},
    "titans-mag": {"pattern": ("mag",), "window_size": 2048, "num_persistent": 128, **TITANS},
    "swa-lmm": {"pattern": ("attention", "memory"), "window_size": 2048, "num_persistent": 128, **TITANS},
}


def presets() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(PRESETS)


def preset(name: str, **overrides: Any) -> ModelConfig:
    """A preset's config with some fields changed.

    Overrides are fields of `ModelConfig`; `chunk_size` changes the rule's, and `gates` those it names. Raises
    ValueError for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{_nearest(name, PRESETS)}; known are {', '.join(PRESETS)}")
    return override(ModelConfig(**PRESETS[name]), **overrides)


def override(config: ModelConfig, **overrides: Any) -> ModelConfig:
    """The config with some fields changed, as `preset` takes them."""
    known = [f.name for f in dataclasses.fields(ModelConfig)]
    for field in overrides:
        if field not in (*known, "chunk_size"):
            raise ValueError(
                f"unknown field {field!r}{_nearest(field, known)}; known are {', '.join(known)}, chunk_size"
            )
    values = dict(overrides)
    rule = values.get("rule", config.rule)
    if "chunk_size" in values:
        rule = dataclasses.replace(rule, chunk_size=values.pop("chunk_size"))
    own = {n: g for n, g in config.gates.items() if n in rule.gates()}
    values |= {"rule": rule, "gates": own | values.get("gates", {})}
    if "pattern" in values:
        values["pattern"] = tuple(values["pattern"])
    return dataclasses.replace(config, **values)


def attention_twin(config: ModelConfig) -> ModelConfig:
    """The attention-only model of equal size: same window, memories out, the SwiGLU wider by what they held.

    Its size is the nearest that a SwiGLU of even width gives.
    """
    pattern = tuple("attention" for _ in config.pattern)
    base = dataclasses.replace(config, pattern=pattern, intermediate_size=config.inner())
    per_unit = 3 * config.hidden_size * config.num_hidden_layers
    extra = round((_size(config) - _size(base)) / per_unit / 2) * 2
    return dataclasses.replace(base, intermediate_size=max(2, config.inner() + extra))


def _size(config: ModelConfig) -> int:
    with torch.device("meta"):
        return LM(config).num_parameters()


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f", perhaps you meant {close[0]!r}" if close else ""
