"""Every preset that has a memory learns: gradients in range, and a loss beside Gated DeltaNet's."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import miras
from miras.core.memory import MLP, Matrix
from miras.core.retention import Decay
from miras.nn.gates import NEVER, Gate
from miras.train.check import LARGEST_NORM, check_training, follow_change, written_once
from miras.train.options import CHECK_SIZES
from miras.zoo import preset, presets

FOUND: dict[str, Any] = json.loads(Path(__file__).with_name("trainability.json").read_text())
SIZES = CHECK_SIZES | {"hidden_size": 32}
TRAINING: dict[str, Any] = {"steps": 60, "batch_size": 1, "seq_len": 512}
REMEMBERING = [name for name in presets() if preset(name).memories()]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """The bounds were measured so: sums in another order are other numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trains(name: str, lr: float) -> None:
    found = FOUND[f"{lr:g}"][name]
    check = check_training(preset(name).changed(SIZES), **TRAINING, lr=lr, reference=False, sensitivity=False)
    assert check.failed is None
    assert check.largest_norm <= LARGEST_NORM
    assert check.last <= found["bound"] * found["references"][0]
    assert all(max(norms) > 0 for norms in check.norms.values())


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_preset_trains(name: str) -> None:
    trains(name, 3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", REMEMBERING)
def test_a_preset_trains_at_a_smaller_rate(name: str) -> None:
    trains(name, 1e-3)


@pytest.mark.parametrize("name", REMEMBERING)
def test_bounds_are_the_worst_of_the_seeds_plus_two_percent_and_near_the_reference(name: str) -> None:
    # At 1e-3 sixty steps are few: some are above the reference there, deltaproduct by 13 %.
    for lr, seeds, near, far in (("0.003", 5, 1.05, 1.15), ("0.001", 1, 1.15, 1.25)):
        found = FOUND[lr][name]
        assert len(found["ratios"]) == len(found["largest_norms"]) == seeds
        assert found["bound"] == pytest.approx(1.02 * max(found["ratios"]), abs=2e-4)
        assert max(found["largest_norms"]) <= LARGEST_NORM
        assert max(found["ratios"]) <= (near if preset(name).memories()[0].conv_size else far)


@pytest.mark.parametrize("name", ["titans-lmm", "titans-mag"])
def test_forgetting_towards_0_does_not_train(name: str) -> None:
    config = preset(name).changed(SIZES | {"retention": Decay()})
    check = check_training(config, **TRAINING, reference=False, sensitivity=False)
    found = FOUND["0.003"][name]
    assert check.largest_norm > LARGEST_NORM
    assert check.last > found["bound"] * found["references"][0]
    assert any("gradient" in problem.what for problem in check.problems())


def test_a_check_measures_what_it_says() -> None:
    config = preset("titans-lmm").changed(SIZES)
    check = check_training(config, steps=20, batch_size=1, seq_len=64)
    assert len(check.loss) == 20
    assert check.parameters == miras.LM(config).num_parameters()
    squares = [sum(n[i] ** 2 for g, n in check.norms.items() if g != "all") for i in range(20)]
    assert squares == pytest.approx([n**2 for n in check.norms["all"]], rel=1e-4)
    assert check.clipped == sum(n > 1 for n in check.norms["all"]) / 20
    assert set(check.weight) == {"layers.0", "layers.1"}
    for layer, each in check.weight.items():
        assert 0 < each.smallest <= each.first <= each.largest
        assert 0 < check.step[layer] < 0.5
    assert check.fresh is not None and check.trained is not None
    assert check.fresh.growth < 0 and check.trained.growth < 0
    assert check.fresh.reaches(0.1) is None and check.fresh.reaches(0.0) == 0
    assert check.reference is not None and 2 < check.reference < 8
    assert json.loads(json.dumps(check.to_dict()))["last"] == check.last


def test_what_does_not_learn_is_named_with_what_to_change() -> None:
    gates = {"lr": dataclasses.replace(NEVER, per_weight=True)}
    still = check_training(
        preset("titans-lmm").changed(SIZES | {"gates": gates}), steps=20, batch_size=1, seq_len=64
    )
    good = check_training(preset("titans-lmm").changed(SIZES), steps=20, batch_size=1, seq_len=64)
    # Twenty steps of 64 bytes say nothing of the loss.
    assert not [p for p in good.problems() if "bits per byte" not in p.what]
    silent = dataclasses.replace(still, norms=still.norms | {"gates": [0.0] * 20})
    assert any("no gradient ever reached gates" in p.what for p in silent.problems())
    steep = dataclasses.replace(good, norms={"all": [1.0] * 15 + [1e5] * 5})
    assert any("1e+05" in p.what and "towards" in p.advice for p in steep.problems())
    failed = dataclasses.replace(good, failed="step 3: the loss is nan")
    assert failed.problems()[0].what == "step 3: the loss is nan"


def test_a_change_grows_where_a_memory_forgets_towards_0() -> None:
    tokens = torch.randint(256, (1, 1200), generator=torch.Generator().manual_seed(0))
    growth = {}
    for towards in ("zero", "initial"):
        torch.manual_seed(0)
        model = miras.LM(preset("yaad").changed(SIZES | {"retention": Decay(towards=towards)}))
        growth[towards] = follow_change(model, tokens).growth
    assert growth["initial"] < 0 < growth["zero"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="has no memory"):
        check_training("transformer")
    with pytest.raises(ValueError, match="at least 20 steps"):
        check_training("titans-lmm", steps=5)
    with pytest.raises(ValueError, match="at least 20,000 ids"):
        check_training("titans-lmm", tokens=[1, 2, 3])
    with pytest.raises(ValueError, match="outside the vocabulary of 64"):
        check_training(preset("titans-lmm").changed(SIZES | {"vocab_size": 64}))
    with pytest.raises(ValueError, match="unbounded"):
        written_once(preset("titans-lmm", gates={"lr": Gate("softplus")}, algorithm=miras.GradientDescent()))


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("deltanet", 0.9),
        ("titans-linear", 0.9),
        ("titans-lmm", 0.9),
        ("ttt-linear", 0.9),
        ("ttt-mlp", 0.9),
        ("yaad", 0.9),
        ("memora", 0.3),
        ("moneta", 0.2),
    ],
)
def test_pairs_written_once_are_read_back(name: str, least: float) -> None:
    """8 pairs of 32 channels, without any training; what Moneta reaches is on its page."""
    assert written_once(preset(name)) >= least


def test_what_is_not_written_is_not_read() -> None:
    config = preset("titans-linear", memory=Matrix(), initial_scale=0.0)
    crowded = written_once(config, 256)
    assert crowded < 0.6 < written_once(config, 8)
    deep = preset("titans-lmm", memory=MLP(), gates={"lr": Gate(scale=1e-6, per_weight=True)})
    assert written_once(deep) < 0.3  # 1 of 8 by chance
