"""Presets: each is a point of the design space with its parameterisation. Data, no logic.

An ablation is one override:

    no momentum               algorithm=GradientDescent(step_bound=1.0)
    no forgetting             retention=Keep()
    forgetting towards 0      retention=Decay(), as the papers print it: deep memories do not learn
    no convolution            conv_size=0
    no persistent tokens      num_persistent=0
    linear memory             memory=Matrix()
    input-independent gates   gates={"forget": Gate(bias=-5.0, source="constant")}, and so for each
    first-order outer loop    algorithm=GradientDescent(momentum=True, step_bound=10.0,
                                                        first_order=True)
    steps uphill              algorithm=GradientAscent(momentum=True, step_bound=10.0)
    q in place of k           features=Features(keys="query")
    last layer only           gates=last_layer(preset(name).memories()[0].rule)

The last three are controls suggested by critics (arXiv 2602.21204): a model that is as good with
one of them does not use its memory as claimed.
"""

import dataclasses
from typing import Any

import torch

from miras.core.algorithm import GradientDescent, Implicit
from miras.core.bias import Dot, Huber, Lp
from miras.core.memory import MLP, Matrix
from miras.core.retention import Decay, Keep, LqNorm, Simplex
from miras.core.rule import Rule
from miras.nn.attention import AttentionConfig
from miras.nn.config import ModelConfig
from miras.nn.gates import ALWAYS, NEVER, Gate
from miras.nn.lm import LM
from miras.nn.memory import Features, MemoryConfig
from miras.nn.part import MixerConfig
from miras.nn.titans import MACConfig, MAGConfig, MALConfig
from miras.store.words import nearest

TITANS = MemoryConfig(
    rule=Rule(
        memory=MLP(),
        retention=Decay(towards="initial"),
        algorithm=GradientDescent(momentum=True, step_bound=10.0),
        chunk_size=16,
    ),
    gates={
        "lr": Gate(scale=0.25, bias=-1.5, per_weight=True),
        "momentum": Gate(scale=0.9, per_weight=True),
        "forget": Gate(bias=-5.0, per_weight=True),
    },
)
"""Titans' memory: deep, momentum, forgetting, a gate for each of its weights (NeurIPS version, 3
and App. B.3)."""

WINDOW = AttentionConfig(window_size=2048)
PERSISTENT = AttentionConfig(window_size=2048, num_persistent=128)


def _by_channel(scale: float, lr: float, forget: float) -> dict[str, Gate]:
    """Gates of Moneta, Yaad and Memora: one per output channel of each weight, of rank 32 (MIRAS
    5.3).

    scale: the largest step; lr, forget: initial biases.
    """
    return {
        "lr": Gate(scale=scale, bias=lr, per_weight=True, channels="output"),
        "forget": Gate(bias=forget, per_weight=True, channels="output"),
    }


PLAIN = Features(activation="identity", values="identity", normalize=False)
"""Queries, keys and values straight from their projections."""

SILU = Features(normalize=False)
"""SiLU after the convolutions, no norm."""

DT = Gate("softplus", bias=-6.9, spread=4.65)
"""Mamba's time step, initially between 0.001 and 0.1 (Mamba 3.6)."""

DECAY = Gate("decay", bias=-6.9, spread=4.65)
"""1 - exp(-A dt), with a learned A between 1 and 16 and a dt of its own as Mamba's (Gated DeltaNet
3.4)."""

MEMORIES: dict[str, MemoryConfig] = {
    "linear-attention": MemoryConfig(
        rule=Rule(Matrix(), Dot(), Keep(), chunk_size=1),
        gates={"lr": ALWAYS},
        features=Features(activation="elu1", values="identity", normalize=False),
        conv_size=0,
        initial_scale=0.0,
    ),
    "retnet": MemoryConfig(
        rule=Rule(Matrix(), Dot(), Decay(), chunk_size=1),
        gates={"lr": ALWAYS, "forget": Gate("exp2", bias=-5.0, step=-1.0, source="fixed")},
        features=dataclasses.replace(PLAIN, scaled=True, rotary=True),
        conv_size=0,
        initial_scale=0.0,
    ),
    "mamba2": MemoryConfig(
        rule=Rule(Matrix(), Dot(), Decay(), chunk_size=1),
        gates={"lr": DT, "forget": Gate("decay", follows="lr")},
        features=SILU,
        initial_scale=0.0,
    ),
    "gla": MemoryConfig(
        rule=Rule(Matrix(), Dot(), Decay(), chunk_size=1),
        gates={"lr": ALWAYS, "forget": Gate("root_sigmoid", channels="input", rank=16)},
        features=dataclasses.replace(PLAIN, scaled=True),
        conv_size=0,
        initial_scale=0.0,
    ),
    "hgrn2": MemoryConfig(
        rule=Rule(Matrix(), Dot(), Decay(), chunk_size=1),
        gates={"lr": ALWAYS, "forget": Gate(bias=-3.0, channels="input", rank=0)},
        features=Features(values="identity", normalize=False, keys="forget"),
        conv_size=0,
        initial_scale=0.0,
    ),
    "mlstm": MemoryConfig(
        rule=Rule(Matrix(), Dot(), Decay(), chunk_size=1),
        gates={"lr": Gate("exp"), "forget": Gate(bias=-6.0, spread=3.0)},
        features=Features(values="identity", normalize=False, scaled=True, normalizer=True),
        initial_scale=0.0,
    ),
    "deltanet": MemoryConfig(
        rule=Rule(Matrix(), retention=Keep(), chunk_size=1),
        gates={"lr": Gate()},
        initial_scale=0.0,
    ),
    "gated-deltanet": MemoryConfig(
        rule=Rule(Matrix(), retention=Decay(decayed=True), chunk_size=1),
        gates={"lr": Gate(), "forget": DECAY},
        initial_scale=0.0,
    ),
    "deltaproduct": MemoryConfig(
        rule=Rule(Matrix(), retention=Decay(decayed=True), algorithm=GradientDescent(steps=2), chunk_size=1),
        gates={"lr": Gate(scale=2.0), "forget": DECAY},
        initial_scale=0.0,
    ),
    "longhorn": MemoryConfig(
        rule=Rule(Matrix(), retention=Keep(), algorithm=Implicit(), chunk_size=1),
        gates={"lr": Gate()},
        features=SILU,
        initial_scale=0.0,
    ),
    "ttt-linear": MemoryConfig(
        rule=Rule(
            MLP(depth=1, bias=True, affine=True, bias_input="key"),
            retention=Keep(),
            algorithm=GradientDescent(step_bound=1.0),
            chunk_size=16,
        ),
        gates={"lr": Gate()},
        features=Features(activation="identity", values="identity"),
    ),
    "ttt-mlp": MemoryConfig(
        rule=Rule(
            MLP(bias=True, affine=True, bias_input="key"),
            retention=Keep(),
            algorithm=GradientDescent(step_bound=1.0),
            chunk_size=16,
        ),
        gates={"lr": Gate(scale=0.1)},
        features=Features(activation="identity", values="identity"),
    ),
    "titans-linear": MemoryConfig(
        rule=dataclasses.replace(TITANS.rule, memory=Matrix()),
        gates={
            "lr": Gate(per_weight=True),
            "momentum": Gate(scale=0.9, per_weight=True),
            "forget": Gate(bias=-8.0, per_weight=True),
        },
        initial_scale=0.0,
    ),
    "titans-lmm": TITANS,
    "moneta": MemoryConfig(
        rule=Rule(
            MLP(),
            Lp(3.0, clip=1.0),
            LqNorm(4.0, towards="initial"),
            GradientDescent(step_bound=1.0),
            chunk_size=16,
        ),
        gates=_by_channel(0.02, lr=-2.0, forget=-3.0),
        initial_scale=0.5,
    ),
    "yaad": MemoryConfig(
        rule=Rule(MLP(), Huber(), Decay(towards="initial"), GradientDescent(step_bound=1.0), chunk_size=16),
        gates=_by_channel(0.35, lr=-2.0, forget=-5.0) | {"delta": Gate("softplus", bias=0.5413)},
    ),
    "memora": MemoryConfig(
        rule=Rule(
            MLP(),
            retention=Simplex("input", towards="initial"),
            algorithm=GradientDescent(step_bound=1.0),
            chunk_size=16,
        ),
        gates=_by_channel(0.25, lr=0.0, forget=-5.0),
        initial_scale=1.5,
    ),
}
"""Models with memories only."""

PRESETS: dict[str, tuple[MixerConfig, ...]] = {
    "transformer": (AttentionConfig(),),
    "swa": (WINDOW,),
    **{name: (memory,) for name, memory in MEMORIES.items()},
    "titans-mac": (MACConfig(memory=TITANS, segment_size=512, num_persistent=128),),
    "titans-mag": (MAGConfig(memory=TITANS, attention=PERSISTENT),),
    "titans-mal": (MALConfig(memory=TITANS, attention=PERSISTENT),),
    "swa-lmm": (PERSISTENT, TITANS),
    **{f"{name}-h": (MEMORIES[name], WINDOW) for name in ("moneta", "yaad", "memora")},
}
"""The mixers of each preset's layers, repeated."""

SOURCES: dict[str, str] = {
    "transformer": "Transformer++ (LLaMA)",
    "swa": "the same, in a sliding window",
    "linear-attention": "Katharopoulos et al. 2020",
    "retnet": "Sun et al. 2023",
    "mamba2": "Dao and Gu 2024",
    "gla": "Yang et al. 2023",
    "hgrn2": "Qin et al. 2024",
    "mlstm": "Beck et al. 2024",
    "deltanet": "Yang et al. 2024a",
    "gated-deltanet": "Yang et al. 2024b",
    "deltaproduct": "Siems et al. 2025",
    "longhorn": "Liu et al. 2024",
    "ttt-linear": "Sun et al. 2024",
    "ttt-mlp": "Sun et al. 2024",
    "titans-linear": "Titans, eq. 32",
    "titans-lmm": "Titans, 3.1",
    "titans-mac": "Titans, 4.1",
    "titans-mag": "Titans, 4.2",
    "titans-mal": "Titans, 4.3",
    "swa-lmm": "Titans, 4.3 reversed",
    "moneta": "MIRAS, eq. 24",
    "yaad": "MIRAS, eq. 26",
    "memora": "MIRAS, eq. 27",
    "moneta-h": "MIRAS, 5.3 and 6",
    "yaad-h": "MIRAS, 5.3 and 6",
    "memora-h": "MIRAS, 5.3 and 6",
}
"""Where each preset comes from."""


def presets() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(PRESETS)


def preset(name: str, **overrides: Any) -> ModelConfig:
    """A preset's config with some settings changed, as `override` changes them.

    Raises ValueError for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        raise ValueError(
            f"unknown preset {name!r}{nearest(str(name), PRESETS)}; known are {', '.join(PRESETS)}"
        )
    return override(ModelConfig(pattern=PRESETS[name]), **overrides)


def override(config: ModelConfig, **overrides: Any) -> ModelConfig:
    """The config with some settings changed, in whichever part they belong to.

    They are fields of `ModelConfig`, of its mixers, and of the rules of its memories (`memory`,
    `bias`, `retention`, `algorithm`, `chunk_size`); `gates` changes the gates that it names;
    `pattern` holds mixers or names of mixers. Raises ValueError for a setting that no part of the
    model has.
    """
    changed = config.changed(overrides)
    if reason := changed.unread(overrides):
        raise ValueError(reason)
    return changed


def last_layer(rule: Rule) -> dict[str, Gate]:
    """Gates that update only the last layer of a rule's memory, as an override of `gates`.

    Raises ValueError for a memory with one layer.
    """
    shapes = rule.memory.shapes(2, 2)
    last = max(i for i, (d_in, _) in enumerate(shapes.values()) if d_in > 1)
    still = list(shapes)[:last]  # a bias after the last matrix belongs to it
    if not any(shapes[n][0] > 1 for n in still):
        raise ValueError(
            f"last_layer: {rule.memory} has one layer, so there is none to leave as it begins; give a deeper one, "
            f"such as MLP()"
        )
    return {f"{name}.{n}": NEVER for name in rule.update_gates for n in still}


def parameters(config: ModelConfig) -> int:
    """The number of learned parameters of a model, computed without making it."""
    with torch.device("meta"):
        return LM(config).num_parameters()


def match_size(config: ModelConfig, wanted: int) -> ModelConfig:
    """The config with the even SwiGLU width that brings the number of parameters closest to
    `wanted`.

    The width is at least 2, so the model may stay larger.
    """
    if config.mlp is None:
        raise ValueError("match_size: the model has no MLP whose width could change")
    per_unit = 3 * config.hidden_size * config.num_hidden_layers
    more = round((wanted - parameters(config)) / per_unit / 2) * 2
    return dataclasses.replace(config, intermediate_size=max(2, config.inner() + more))


def attention_twin(config: ModelConfig) -> ModelConfig:
    """The attention-only model of equal size: the same windows (the segment length for memory as
    context), no memories, and a SwiGLU wider by as many parameters as they had.

    A layer without attention gets that of the next layer with attention. The size is the closest
    that an even SwiGLU width gives.
    """
    seen = [each.sees() for each in config.pattern]
    other = next((fields for fields in seen if fields), {})
    pattern = tuple(AttentionConfig(**(fields or other)) for fields in seen)
    base = dataclasses.replace(config, pattern=pattern, intermediate_size=config.inner())
    return match_size(base, parameters(config))
