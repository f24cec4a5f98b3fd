"""Tiny models: two layers, 32 wide, chunks of 8."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from miras.data.novel import load_novel
from miras.nn.lm import LM
from miras.zoo import preset

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 8}


@pytest.fixture
def tiny() -> Callable[..., LM]:
    """A model by preset and seed; attention sees 16 tokens unless told otherwise."""

    def make(name: str = "titans-mag", seed: int = 0, **options: object) -> LM:
        torch.manual_seed(seed)
        window = {} if name == "titans-lmm" else {"window_size": 16, "num_persistent": 4}
        return LM(preset(name).changed(SIZES | window | options))  # pyright: ignore

    return make


@pytest.fixture(scope="session")
def text() -> NDArray[np.uint8]:
    """2000 bytes of a novel."""
    return np.frombuffer(load_novel().heldout[:2000], dtype=np.uint8)
