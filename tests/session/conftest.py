"""Tiny models: two layers, 16 wide, chunks of 4."""

from collections.abc import Callable

import pytest
import torch

from miras.data.novel import load_novel
from miras.data.tokens import ByteTokenizer
from miras.nn.lm import LM
from miras.session.session import Session
from miras.zoo import preset

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 4}
WINDOWED = {"window_size": 8, "num_persistent": 2}
OWN = {"titans-lmm": {}, "titans-mac": {"segment_size": 8, "num_persistent": 2}}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LM]:
    """A model by preset and seed."""

    def make(name: str = "titans-mag", seed: int = 0, **options: object) -> LM:
        torch.manual_seed(seed)
        return LM(preset(name).changed(SIZES | OWN.get(name, WINDOWED) | options))  # pyright: ignore

    return make


@pytest.fixture
def session(tiny: Callable[..., LM]) -> Session:
    """A session of a tiny model, which keeps 40 tokens of each episode."""
    return Session(tiny(), ByteTokenizer(), keep=40)


@pytest.fixture(scope="session")
def text() -> bytes:
    """2000 bytes of a novel."""
    return load_novel().heldout[:2000]
