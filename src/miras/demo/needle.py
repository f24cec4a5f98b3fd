"""The needle model: 0.1M parameters, trained on contexts of at most 2048 bytes, read at any length.

The recipe is the committed one: `retrain` makes the shipped models anew. A memory that is to hold a number for a
million bytes must write nothing on filler. So its gates are hard (they can be exactly 0) and training asks a small
price for opening them once needles are found at all.
"""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch

from miras.core.algorithm import GradientDescent
from miras.core.memory import Matrix
from miras.core.rule import Rule
from miras.nn.config import ModelConfig
from miras.nn.folder import load_model, save_model
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.train.loop import Run
from miras.train.options import Settings
from miras.train.tasks import NeedleTraining
from miras.zoo import attention_twin, preset

STEPS = 1400
SETTINGS = Settings(
    steps=STEPS, lr=3e-3, min_lr=0.02, warmup=50, weight_decay=0.01, beta1=0.9, beta2=0.98, write_price=0.2
)
NAMES = ("memory", "twin")


def needle_config() -> ModelConfig:
    """Sliding-window attention over 64 bytes, then a linear memory; hard gates, chunks of 16."""
    return preset(
        "swa-lmm",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_heads=2,
        window_size=64,
        num_persistent=0,
        rule=Rule(Matrix(), algorithm=GradientDescent(momentum=True, step_bound=2.0), chunk_size=16),
        gates={
            "lr": Gate(link="hard", scale=0.8),
            "momentum": Gate(scale=0.5),
            "forget": Gate(link="hard", bias=-3.0),
        },
        initial_scale=0.0,
        tie_word_embeddings=True,
    )


def needle_configs() -> dict[str, ModelConfig]:
    """The memory model's config and its attention-only twin's, of the same size."""
    memory = needle_config()
    return {"memory": memory, "twin": attention_twin(memory)}


def retrain(
    folder: Path, seed: int, show: Callable[[str, dict[str, float]], None], steps: int = STEPS
) -> dict[str, LM]:
    """Train both by the recipe and write them to folder/memory and folder/twin."""
    models: dict[str, LM] = {}
    for name, config in needle_configs().items():
        torch.manual_seed(seed)
        run = Run(LM(config), NeedleTraining(seed=seed), SETTINGS)
        longest = 0.0
        for row in run.until(steps):
            longest = row["longest"]
            show(name, row)
        about = {"steps": steps, "seed": seed, "tokens": run.tokens, "longest": longest}
        save_model(run.model, folder / name, {"recipe.json": json.dumps(about).encode()})
        models[name] = run.model
    return models


def load(folder: Path | None = None) -> dict[str, LM]:
    """The two models: the shipped ones, or those in a folder that `retrain` wrote."""
    if folder is not None:
        return {name: load_model(folder / name).eval() for name in NAMES}
    with resources.as_file(resources.files("miras.demo") / "assets") as assets:
        return {name: load_model(assets / name).eval() for name in NAMES}
