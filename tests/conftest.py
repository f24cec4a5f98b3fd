"""What every test gets: no network, one thread per worker, and NaN where core reads memory nobody wrote."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)
# A shell that starts the tests in the background has SIGINT ignored, which processes hand on to those they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Set before torch is imported, so that tests which need no torch do not pay for its import.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import pytest
from hypothesis import settings

# Examples are the same on every machine, and a slow machine is no failure.
settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")

CORE = Path(__file__).parent / "core"


@pytest.fixture(autouse=True)
def nan_filled_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Under tests/core, `torch.empty` and its kin hand out NaN, so that reading unwritten memory shows."""
    if CORE in request.path.parents:
        import torch

        with torch.device(
            "meta"
        ):  # torch remembers which functions make tensors: let it see the real ones first
            torch.empty(0)

        def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def made(*args: Any, **kwargs: Any) -> torch.Tensor:
                out = make(*args, **kwargs)
                if out.is_floating_point() or out.is_complex():
                    with torch.no_grad():
                        out.fill_(float("nan"))
                return out

            return made

        monkeypatch.setattr(torch, "empty", filled(torch.empty))
        monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
        monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    yield
