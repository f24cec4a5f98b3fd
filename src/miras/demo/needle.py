"""The needle model: 0.2M parameters, trained on contexts of at most 2048 bytes, read at any length.

`retrain` repeats the training of the shipped models. A memory that is to hold a number for a
million bytes of any text must not write on filler. So its gates are hard (they can be exactly 0),
training penalises opening them once needles are found at all, and there are many kinds of filler.
Training has stages: keeping a number, then values of all kinds, then keeping them for long.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from miras.core.algorithm import GradientDescent
from miras.core.memory import Matrix
from miras.core.retention import Keep
from miras.core.rule import Rule
from miras.data.fillers import mixture
from miras.data.needle import Curriculum, NeedleTask
from miras.nn.config import ModelConfig
from miras.nn.folder import load_model, save_model
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.train.checkpoint import checkpoints
from miras.train.loop import Run
from miras.train.options import Settings
from miras.train.tasks import NeedleTraining
from miras.zoo import attention_twin, preset

NAMES = ("memory", "twin")
KEYS = ("letters", "word", "number", "code")
VALUES = ("number", "word", "code")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training: number of steps, lengths, and kinds of keys and values."""

    steps: int
    lr: float
    min_lr: float
    lengths: tuple[int, ...]
    keys: tuple[str, ...] = KEYS
    values: tuple[str, ...] = VALUES
    tokens_per_step: int = 4096

    def task(self, seed: int, books: Sequence[bytes]) -> NeedleTraining:
        """Its needles, in the mixture of fillers and in given books."""
        first = NeedleTask(self.lengths[0], filler=mixture(books), keys=self.keys, values=self.values)
        return NeedleTraining(
            tokens_per_step=self.tokens_per_step,
            seed=seed,
            curriculum=Curriculum(lengths=self.lengths),
            kind=first,
        )

    def settings(self) -> Settings:
        """How its optimizer steps."""
        return Settings(
            steps=self.steps,
            lr=self.lr,
            min_lr=self.min_lr,
            warmup=50,
            weight_decay=0.01,
            beta1=0.9,
            beta2=0.98,
            write_price=0.2,
        )


STAGES = (
    Stage(steps=500, lr=3e-3, lengths=(128, 192, 256), keys=("letters",), values=("number",), min_lr=0.5),
    Stage(steps=250, lr=2e-3, lengths=(128, 192, 256), min_lr=0.5),
    Stage(steps=1300, lr=1.5e-3, lengths=(256, 384, 512, 768, 1024, 1536, 2048), min_lr=0.02),
)
STEPS = sum(stage.steps for stage in STAGES)
"""Of the model with memory."""


def needle_config() -> ModelConfig:
    """Two layers of attention over 32 bytes, then a linear memory with an exact delta rule and a
    hard gate.

    Only overwriting removes anything, so only the write gate has to distinguish filler from
    needles.
    """
    return preset(
        "swa-lmm",
        pattern=("attention", "attention", "memory"),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_heads=2,
        head_dim=64,
        window_size=32,
        num_persistent=0,
        rule=Rule(Matrix(), retention=Keep(), algorithm=GradientDescent(), chunk_size=1),
        gates={"lr": Gate(link="hard")},
        initial_scale=0.0,
        tie_word_embeddings=True,
    )


def needle_configs() -> dict[str, ModelConfig]:
    """The memory model's config and its attention-only twin's, of the same size."""
    memory = needle_config()
    return {"memory": memory, "twin": attention_twin(memory)}


def retrain(
    folder: Path,
    seed: int,
    show: Callable[[str, dict[str, float]], None],
    stages: Sequence[Stage] = STAGES,
    books: Sequence[bytes] = (),
    names: Sequence[str] = NAMES,
) -> dict[str, LM]:
    """Train the models by the recipe and write them to folder/memory and folder/twin.

    The twin has only the first stage: in the later ones needles are farther back than it sees, and
    it learned nothing. An interrupted run in folder/runs is resumed. `show` gets a row per step,
    counted over all stages. `books` are texts to train on besides the mixture.
    """
    models: dict[str, LM] = {}
    for name in names:
        torch.manual_seed(seed)
        model = LM(needle_configs()[name])
        before, tokens, longest = 0, 0, 0.0
        for number, stage in enumerate(stages if name == "memory" else stages[:1]):
            task, place = stage.task(seed + number, books), folder / "runs" / name / f"stage-{number}"
            there = checkpoints(place) if place.exists() else []
            settings = stage.settings()
            run = Run.load(there[-1], task, settings) if there else Run(model, task, settings)
            for row in run.until(stage.steps):
                longest = row["longest"]
                if run.step % 200 == 0:
                    run.save(place, {}, {}, keep=1)
                show(name, row | {"step": before + row["step"], "tokens": tokens + row["tokens"]})
            run.save(place, {}, {}, keep=1)
            model, before, tokens = run.model, before + stage.steps, tokens + run.tokens
        about = {
            "command": "miras demo --retrain-needle",
            "steps": before,
            "seed": seed,
            "tokens": tokens,
            "longest": longest,
            "books": len(books),
        }
        save_model(model, folder / name, {"recipe.json": json.dumps(about).encode()})
        models[name] = model
    return models


def load(folder: Path | None = None, names: Sequence[str] = NAMES) -> dict[str, LM]:
    """The two models: the shipped ones, or those in a folder written by `retrain`."""
    if folder is not None:
        return {name: load_model(folder / name).eval() for name in names}
    with resources.as_file(resources.files("miras.demo") / "assets") as assets:
        return {name: load_model(assets / name).eval() for name in names}
