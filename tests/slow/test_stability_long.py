"""What tests/nn/test_stability.py checks on 2,000 tokens, on 20,000."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

from miras.data.novel import load_novel
from miras.nn.lm import LM
from miras.train.options import CHECK_SIZES
from miras.zoo import preset, presets

SIZES = CHECK_SIZES | {"hidden_size": 32}

SHORT = spec_from_file_location("stability", Path(__file__).parents[1] / "nn" / "test_stability.py")
assert SHORT is not None and SHORT.loader is not None
short = module_from_spec(SHORT)
SHORT.loader.exec_module(short)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("name", presets())
def test_default_gates(name, chunk_size):
    short.stays_finite(name, chunk_size, 20_000)


@pytest.mark.parametrize("name", short.EXACT)
def test_default_gates_of_the_exact_recurrences(name):
    short.stays_finite(name, 1, 20_000)


@pytest.mark.parametrize("name", [name for name in presets() if name != "transformer"])
@torch.inference_mode()
def test_300_000_tokens_of_text_are_finite(name):
    torch.manual_seed(0)
    model = LM(preset(name).changed(SIZES))
    text = np.frombuffer(load_novel().train[:300_000], np.uint8).astype(np.int64)
    state = None
    for piece in torch.from_numpy(text)[None].split(4096, 1):
        logits, state = model(piece, state)
        assert logits.isfinite().all()
    assert state is not None and all(
        x.isfinite().all() for x in state.tensors().values() if x.is_floating_point()
    )
