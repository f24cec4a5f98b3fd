"""The long checks behind the README's claims."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miras.data.fillers import HELDOUT
from miras.data.needle import NeedleTask
from miras.demo.needle import load, retrain
from miras.evaluate.needle import needle_accuracy

LEAST = [(2048, 100, 0.9), (16_384, 20, 0.8)]
"""Lengths, haystacks and the least share to find: the README's figures, less what so few samples leave open."""

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_a_million_bytes_cost_no_more_memory_or_time_per_token_than_fifty_thousand():
    command = [sys.executable, str(ROOT / "benchmarks" / "streaming.py"), "--json"]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for name, tolerance in (("peak_mb", 0.02), ("prefill", 0.10), ("decode", 0.10)):
        few, many = measured[name]["50000"], measured[name]["1000000"]
        assert many == pytest.approx(few, rel=tolerance), name


@pytest.mark.parametrize("filler", HELDOUT)
@pytest.mark.parametrize(("length", "n", "least"), LEAST)
def test_the_shipped_model_finds_the_needle_and_its_twin_does_not(length, n, least, filler):
    torch.set_num_threads(2)
    for name, model in load().items():
        task = NeedleTask(length, filler=filler)
        result = needle_accuracy(model, task, n=n, batch_size=min(n, 50), seed=77)
        assert result.accuracy >= least if name == "memory" else result.accuracy <= 0.05, (name, result)


def test_the_recipe_makes_the_needle_model_anew(tmp_path):
    torch.set_num_threads(2)
    rows = []
    models = retrain(tmp_path, 1, lambda name, row: rows.append((name, row["longest"])))
    assert max(longest for name, longest in rows if name == "memory") == 2048
    result = needle_accuracy(models["memory"].eval(), NeedleTask(16_384), n=32, batch_size=32, seed=5)
    assert result.accuracy >= 0.8
    assert all(
        torch.equal(a, b)
        for a, b in zip(load(tmp_path)["memory"].parameters(), models["memory"].parameters(), strict=True)
    )
