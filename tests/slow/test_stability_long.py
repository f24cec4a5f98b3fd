"""What tests/nn/test_stability.py checks on 2,000 tokens, on 20,000."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from miras.zoo import presets

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
