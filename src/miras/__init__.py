"""Memory that learns at test time, for sequence models."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "miras.core.memory": ("Memory", "Matrix", "MLP", "GatedMLP", "Vector"),
    "miras.core.bias": ("Bias", "L2", "Dot", "L1", "Lp", "LInf", "Huber", "Robust"),
    "miras.core.retention": (
        "Retention",
        "Keep",
        "Decay",
        "ElasticNet",
        "ProximalElasticNet",
        "LqNorm",
        "Simplex",
        "FDivergence",
        "Bregman",
        "Sigmoid",
    ),
    "miras.core.algorithm": ("Algorithm", "GradientDescent", "GradientAscent", "Implicit", "Muon"),
    "miras.core.rule": ("Rule", "State", "init_state"),
    "miras.core.recurrence": ("recurrence",),
    "miras.core.schedule": ("Schedule",),
    "miras.core.observe": ("observe",),
    "miras.engine": ("scan",),
    "miras.nn.feature_map": ("FeatureMap", "Identity", "Polynomial"),
    "miras.nn.gates": ("Gate",),
    "miras.nn.part": ("Sizes", "MixerConfig", "MLPConfig"),
    "miras.nn.mlp": ("SwiGLUConfig",),
    "miras.nn.memory": ("MemoryConfig", "MemoryLayer", "Features"),
    "miras.nn.attention": ("AttentionConfig", "AttentionLayer"),
    "miras.nn.sum": ("SumConfig",),
    "miras.nn.titans": (
        "MACConfig",
        "MAGConfig",
        "MALConfig",
        "MemoryAsContext",
        "MemoryAsGate",
        "MemoryAsLayer",
    ),
    "miras.nn.config": ("ModelConfig",),
    "miras.nn.lm": ("LM", "LMState"),
    "miras.nn.compiled": ("Compiled",),
    "miras.zoo": ("preset", "presets"),
    "miras.nn.folder": ("load_model", "save_model"),
    "miras.nn.reading": ("read_pieces",),
    "miras.data.tokens": ("ByteTokenizer", "FileTokenizer", "load_tokenizer"),
    "miras.stream.generation": ("generate",),
    "miras.stream.run": ("read",),
    "miras.stream.files": ("load_state", "save_state"),
    "miras.train.check": ("check_training",),
    "miras.report.look": ("surprise_page",),
    "miras.hf": (
        "MirasConfig",
        "MirasModel",
        "MirasForCausalLM",
        "MirasForSequenceClassification",
        "MirasCache",
    ),
    "miras.session.session": ("Session",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from miras.core.algorithm import Algorithm as Algorithm
    from miras.core.algorithm import GradientAscent as GradientAscent
    from miras.core.algorithm import GradientDescent as GradientDescent
    from miras.core.algorithm import Implicit as Implicit
    from miras.core.algorithm import Muon as Muon
    from miras.core.bias import L1 as L1
    from miras.core.bias import L2 as L2
    from miras.core.bias import Bias as Bias
    from miras.core.bias import Dot as Dot
    from miras.core.bias import Huber as Huber
    from miras.core.bias import LInf as LInf
    from miras.core.bias import Lp as Lp
    from miras.core.bias import Robust as Robust
    from miras.core.memory import MLP as MLP
    from miras.core.memory import GatedMLP as GatedMLP
    from miras.core.memory import Matrix as Matrix
    from miras.core.memory import Memory as Memory
    from miras.core.memory import Vector as Vector
    from miras.core.observe import observe as observe
    from miras.core.recurrence import recurrence as recurrence
    from miras.core.retention import Bregman as Bregman
    from miras.core.retention import Decay as Decay
    from miras.core.retention import ElasticNet as ElasticNet
    from miras.core.retention import FDivergence as FDivergence
    from miras.core.retention import Keep as Keep
    from miras.core.retention import LqNorm as LqNorm
    from miras.core.retention import ProximalElasticNet as ProximalElasticNet
    from miras.core.retention import Retention as Retention
    from miras.core.retention import Sigmoid as Sigmoid
    from miras.core.retention import Simplex as Simplex
    from miras.core.rule import Rule as Rule
    from miras.core.rule import State as State
    from miras.core.rule import init_state as init_state
    from miras.core.schedule import Schedule as Schedule
    from miras.data.tokens import ByteTokenizer as ByteTokenizer
    from miras.data.tokens import FileTokenizer as FileTokenizer
    from miras.data.tokens import load_tokenizer as load_tokenizer
    from miras.engine import scan as scan
    from miras.hf import MirasCache as MirasCache
    from miras.hf import MirasConfig as MirasConfig
    from miras.hf import MirasForCausalLM as MirasForCausalLM
    from miras.hf import MirasForSequenceClassification as MirasForSequenceClassification
    from miras.hf import MirasModel as MirasModel
    from miras.nn.attention import AttentionConfig as AttentionConfig
    from miras.nn.attention import AttentionLayer as AttentionLayer
    from miras.nn.compiled import Compiled as Compiled
    from miras.nn.config import ModelConfig as ModelConfig
    from miras.nn.feature_map import FeatureMap as FeatureMap
    from miras.nn.feature_map import Identity as Identity
    from miras.nn.feature_map import Polynomial as Polynomial
    from miras.nn.folder import load_model as load_model
    from miras.nn.folder import save_model as save_model
    from miras.nn.gates import Gate as Gate
    from miras.nn.lm import LM as LM
    from miras.nn.lm import LMState as LMState
    from miras.nn.memory import Features as Features
    from miras.nn.memory import MemoryConfig as MemoryConfig
    from miras.nn.memory import MemoryLayer as MemoryLayer
    from miras.nn.mlp import SwiGLUConfig as SwiGLUConfig
    from miras.nn.part import MixerConfig as MixerConfig
    from miras.nn.part import MLPConfig as MLPConfig
    from miras.nn.part import Sizes as Sizes
    from miras.nn.reading import read_pieces as read_pieces
    from miras.nn.sum import SumConfig as SumConfig
    from miras.nn.titans import MACConfig as MACConfig
    from miras.nn.titans import MAGConfig as MAGConfig
    from miras.nn.titans import MALConfig as MALConfig
    from miras.nn.titans import MemoryAsContext as MemoryAsContext
    from miras.nn.titans import MemoryAsGate as MemoryAsGate
    from miras.nn.titans import MemoryAsLayer as MemoryAsLayer
    from miras.report.look import surprise_page as surprise_page
    from miras.session.session import Session as Session
    from miras.stream.files import load_state as load_state
    from miras.stream.files import save_state as save_state
    from miras.stream.generation import generate as generate
    from miras.stream.run import read as read
    from miras.train.check import check_training as check_training
    from miras.zoo import preset as preset
    from miras.zoo import presets as presets


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that `miras --help` does not import torch.
    if name not in _HOME:
        raise AttributeError(f"module 'miras' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
