"""Tiny models in both forms, and quiet progress bars."""

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch import Tensor

from miras.hf import MirasForCausalLM
from miras.nn.config import ModelConfig
from miras.nn.gates import Gates
from miras.nn.lm import LM
from miras.zoo import preset

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "chunk_size": 4,
    "window_size": 8,
    "segment_size": 8,
    "num_persistent": 2,
}
Make = Callable[..., MirasForCausalLM]


def config(name: str = "titans-mag", **changed: object) -> ModelConfig:
    """A preset, tiny; a rule of the single token stays one."""
    sizes = SIZES | {"chunk_size": min(SIZES["chunk_size"], preset(name).stride())}
    return preset(name).changed(sizes | changed)  # pyright: ignore


def build(name: str = "titans-mag", seed: int = 0, **changed: object) -> LM:
    """A model with livelier gates than at the start of training."""
    torch.manual_seed(seed)
    model = LM(config(name, **changed))
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, Gates):
                part.reset_parameters(0.3)
    return model.eval()


def text(rows: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (rows, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny() -> Make:
    """A model by preset; `kwargs` of the config by their names."""

    def make(name: str = "titans-mag", seed: int = 0, hf: dict | None = None, **changed: object):
        lm = build(name, seed, **changed)
        return MirasForCausalLM.of(lm, **(hf or {}))

    return make


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.disable_progress_bar()
    yield
