"""The demo, small: what it shows is what happened."""

from importlib import resources

import pytest
import torch

from miras.data.needle import NeedleTask
from miras.demo.needle import STEPS, load, needle_config, needle_configs
from miras.demo.needle_act import shipped_accuracy
from miras.demo.options import DemoOptions
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
        assert len(file.read_bytes()) < 600_000
    assert models["memory"].num_parameters() == pytest.approx(models["twin"].num_parameters(), rel=0.01)
    assert needle_config().rule.chunk_size == 16 and STEPS > 0


def test_the_shipped_memory_finds_needles_eight_times_as_far_as_it_was_trained():
    found = {
        name: needle_accuracy(m, NeedleTask(16_384), n=6, batch_size=6, seed=5) for name, m in load().items()
    }
    assert found["memory"].accuracy == 1.0 and found["twin"].accuracy == 0.0


def test_the_shipped_accuracy_is_marked_as_measured_before():
    shown = shipped_accuracy()
    assert shown is not None and shown.precomputed and "benchmarks/needle.py" in shown.command
    memory, twin = (dict((p.context, p) for p in s.points) for s in shown.series)
    assert set(memory) == set(twin) == {2048, 16_384, 131_072, 1_000_000}
