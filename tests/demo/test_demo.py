"""The demo, small: what it shows is what happened."""

import json
import re
import time
from importlib import resources

import pytest
import torch
from rich.console import Console

from miras.data.fillers import HELDOUT
from miras.data.needle import NeedleTask
from miras.data.novel import load_novel
from miras.demo import needle_act as act_one
from miras.demo.needle import STAGES, STEPS, Stage, load, needle_config, needle_configs, retrain
from miras.demo.needle_act import other_texts, shipped_accuracy, shipped_rows
from miras.demo.options import DemoOptions
from miras.demo.reading_act import new_run, reading_config, train_for
from miras.demo.run import demo
from miras.evaluate.needle import needle_accuracy


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_demo_runs_and_leaves_a_report(tmp_path, capsys):
    assert demo(DemoOptions(out=tmp_path, needle_bytes=8192, reading_seconds=0.1, seed=3)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "largest difference 0" in said and "report.html" in said
    page = (tmp_path / "report.html").read_text()
    # What comes first is what a reader would call surprise, and how far the others go with it is said.
    assert '"kind": "predictive"' in page
    rank = re.compile(r"over this text .*: momentary [+-]\d\.\d\d, accumulated [+-]\d\.\d\d")
    assert rank.search(page) and rank.search(said)
    # What was shipped is not among what was measured, and the haystack is what it is.
    assert "The grass is green" in page and "over and over" in page and "Everything on this page" not in page
    assert page.count("weights shipped") == 3 and "Shipped with the package, and not made in this run" in page
    rows = json.loads((resources.files("miras.demo") / "assets" / "accuracy.json").read_text())
    novel = [r["accuracy"] for r in rows if r["model"] == "memory" and r["filler"] == "books"]
    assert all(f"{100 * share:.3g} %" in page for share in novel)
    sample = NeedleTask(8192, depth=0.01).sample(1_000_003, 0)
    assert sample.value in page and sample.key in page and "Great Expectations" in page
    assert len(page) < 400_000
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "model", "memory.safetensors"}


@pytest.mark.parametrize(
    ("changes", "message"), [({"needle_bytes": 10}, "4096"), ({"reading_seconds": 0}, "positive")]
)
def test_wrong_options_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        demo(DemoOptions(out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_shipped_models_are_the_recipe_s_and_small():
    models = load()
    configs = needle_configs()
    for name, model in models.items():
        assert model.config == configs[name]
        file = resources.files("miras.demo") / "assets" / name / "model.safetensors"
        assert len(file.read_bytes()) < 900_000
    assert models["memory"].num_parameters() == pytest.approx(models["twin"].num_parameters(), rel=0.01)
    assert needle_config().stride() == 1 and STEPS > 0
    assert max(length for stage in STAGES for length in stage.lengths) == 2048, "as the page says"


@pytest.mark.parametrize("filler", HELDOUT)
def test_the_shipped_memory_finds_needles_eight_times_as_far_as_it_was_trained_in_texts_it_never_saw(
    filler,
):
    task = NeedleTask(16_384, filler=filler)
    found = {name: needle_accuracy(m, task, n=3, batch_size=3, seed=5) for name, m in load().items()}
    assert found["memory"].correct >= 2 and found["twin"].correct == 0


def test_a_stopped_training_of_needle_models_goes_on_with_the_same_numbers(tmp_path):
    few = {"lr": 1e-3, "min_lr": 0.1, "tokens_per_step": 256}
    stages = (Stage(steps=2, lengths=(128,), **few), Stage(steps=2, lengths=(128, 192), **few))
    told: list[tuple[str, float]] = []
    whole = retrain(tmp_path / "whole", 3, lambda n, row: told.append((n, row["step"])), stages)
    assert told == [*(("memory", step) for step in range(4)), ("twin", 0), ("twin", 1)]

    def stop(name: str, row: dict[str, float]) -> None:
        if (name, row["step"]) == ("memory", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrain(tmp_path / "parts", 3, stop, stages)
    told.clear()
    parts = retrain(tmp_path / "parts", 3, lambda n, row: told.append((n, row["step"])), stages)
    assert told[:2] == [("memory", 2), ("memory", 3)], "the first stage is not trained again"
    for name, model in whole.items():
        pairs = zip(model.parameters(), parts[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert load(tmp_path / "parts")[name].config == model.config


def test_the_shipped_accuracy_is_that_of_the_file():
    rows = shipped_rows()
    memory, twin = shipped_accuracy(rows)
    assert set(memory.x) >= {2048, 16_384, 131_072} and set(twin.x) >= {2048}
    assert (memory.role, twin.role) == ("memory", "twin") and memory.x == sorted(memory.x)
    for curve in (memory, twin):
        own = {r["length"]: r for r in rows if r["model"] == curve.role and r["filler"] == "noise"}
        assert curve.y == [100 * own[x]["correct"] / own[x]["n"] for x in curve.x]
        assert all(low <= y <= high for low, y, high in zip(curve.low, curve.y, curve.high, strict=True))


def test_every_text_that_was_measured_is_in_the_table_beside_the_chart():
    rows = shipped_rows()
    table = other_texts(rows)
    assert {(h.context, h.memory, h.n) for h in table} == {
        (r["length"], 100 * r["accuracy"], r["n"])
        for r in rows
        if r["model"] == "memory"
        and any((o["model"], o["filler"], o["length"]) == ("twin", r["filler"], r["length"]) for o in rows)
    }
    assert {h.name for h in table} >= {"this filler", "a novel's last chapters", "lorem ipsum", "digits"}


def test_training_stops_on_time_however_busy_the_machine_becomes(monkeypatch):
    """Ten steps at a hundredth of a second, then steps of one second: a guess from the first ones fits 400."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    runs = {name: new_run(reading_config(), load_novel(), 0) for name in ("titans-mag", "attention only")}
    shares: list[float] = []
    for name, run in runs.items():

        def advance(run=run, first=name == "titans-mag"):
            shares.append(run.step / run.settings.steps)
            now[0] += 0.005 if run.step < 10 else 0.5
            run.step += 1
            return {"tokens": 1024 * run.step, "bits_per_byte": 8.0 / run.step}

        monkeypatch.setattr(run, "advance", advance)
    curves = train_for(runs, 20.0, Console(quiet=True))
    assert 20 <= now[0] <= 21.1
    steps = {run.step for run in runs.values()}
    assert steps == {30} and [c.x for c in curves] == [[1024 * k for k in range(1, 31)]] * 2
    assert shares[-1] > 0.9  # the learning rate has fallen to its end
    assert [c.role for c in curves] == ["memory", "twin"]
    assert curves[0].y[:2] == [8.0, 6.0]  # plain means


def test_on_a_slow_machine_the_haystack_is_smaller(monkeypatch):
    monkeypatch.setattr(act_one, "SECONDS", 0.0)
    monkeypatch.setattr(act_one, "PIECE", 2048)
    act = act_one.needle_act(load(), 400_000, 3, Console(quiet=True))
    assert act.correct and act.needle_position < act.bytes_read < 12_000
    assert act.process_memory.x[-1] == act.bytes_read
    assert max(act.write_rate.y) > 1e-6  # the piece with the needle was watched
    assert f"{act.bytes_read:,} of 400,000 bytes" in act.notes[0]
