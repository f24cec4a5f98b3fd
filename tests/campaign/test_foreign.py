"""Folders of strangers: whatever their files say, one line and status 2, or a model that can be read."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from miras.cli import main
from miras.data.tokens import ByteTokenizer
from miras.nn.folder import save_model
from miras.nn.lm import LM
from miras.zoo import preset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CASES = 150
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**40,
    2**70,
    1e300,
    -0.5,
    "",
    "x",
    "a:b",
    [],
    ["memory"],
    {},
    {"name": "x"},
]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "chunk_size": 4, "window_size": 8}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in plain values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, part in items for each in places(part, (*path, key)))]


def changed(values: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(values) if isinstance(values, dict) else list(values)
    copy[path[0]] = changed(values[path[0]], path[1:], new)
    return copy


def test_configs_that_say_anything(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(LM(preset("titans-mag", num_persistent=2, **SIZES)), "model", ByteTokenizer().files())  # pyright: ignore
    Path("text").write_bytes(b"The memory reads on. ")
    Path("model/checksums.json").unlink()
    whole = json.loads(Path("model/config.json").read_text())
    everywhere = places(whole)
    rng = random.Random(0)
    read = refused = 0
    slowest = 0.0
    for case in range(CASES):
        values = changed(whole, rng.choice(everywhere), rng.choice(ODD))
        Path("model/config.json").write_text(json.dumps(values))
        began = time.monotonic()
        status = main(["stream", "model", "text"])
        slowest = max(slowest, time.monotonic() - began)
        out, err = capsys.readouterr()
        assert status in (0, 2), (case, values)
        if status:
            refused += 1
            assert err.startswith("miras: ") and err.count("\n") == 1, err
        else:
            read += 1
            assert "bits per byte" in out
    assert refused > CASES // 2
    print(
        f"\n| a foreign config.json | {CASES} changed values | {refused} refused in one line, {read} read |"
    )
