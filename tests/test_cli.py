"""The command line: what is printed, what is written, and one clear line for what goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import miras
from miras import __version__, commands
from miras.cli import COMMANDS, main, parse
from miras.core.algorithm import Algorithm
from miras.core.bias import Bias
from miras.core.memory import Memory
from miras.core.retention import Retention
from miras.data.novel import load_novel
from miras.data.tokens import ByteTokenizer
from miras.nn.feature_map import FeatureMap
from miras.nn.folder import load_model, model_hash, save_model
from miras.nn.lm import LM
from miras.nn.plain import KINDS, hints_of
from miras.options import EvalOptions, InfoOptions, StreamOptions
from miras.stream import load_state, read, source
from miras.train import choices
from miras.train.options import TrainOptions
from miras.zoo import preset

TEXT = load_novel().heldout[:900]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 8, "window_size": 16}


def build(name: str = "titans-mag", seed: int = 0, **options: object) -> LM:
    torch.manual_seed(seed)
    return LM(preset(name).changed(SIZES | options))  # pyright: ignore


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its twin, and a text; nothing writes to it."""
    folder = tmp_path_factory.mktemp("shared")
    save_model(build(), folder / "model")
    save_model(build("transformer"), folder / "twin")
    (folder / "text.txt").write_bytes(TEXT)
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with `model`, `twin` and `text.txt`."""
    for name in ("model", "twin", "text.txt"):
        (tmp_path / name).symlink_to(shared / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MIRAS_DEBUG", raising=False)
    return tmp_path


def run(line: str) -> int:
    return main(line.split())


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a wrong command line says: one line, on standard error, with exit status 2."""
    capsys.readouterr()
    assert run(line) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.startswith("miras: ") and err.count("\n") == 1, err
    return err


# Help


def test_help_needs_no_torch():
    code = (
        "import sys; from miras.cli import COMMANDS, main\n"
        "for name in COMMANDS: assert main([name, '--help']) == 0, name\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0\n"
        "found = {'torch', 'transformers', 'numpy'} & sys.modules.keys(); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert f"usage: miras {name}" in done.stdout
        assert f"{name} " in done.stdout and (command.__doc__ or "?").strip() in done.stdout
    assert "--config FILE.yaml" in done.stdout and f"miras {__version__}" in done.stdout
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "miras.cli", "eval", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    print(f"`miras eval --help` took {sorted(times)[2]:.3f} s")


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "usage: miras COMMAND" in capsys.readouterr().out


# Errors


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "steam",
            "unknown command 'steam', perhaps you meant 'stream'; known are train, check-training, eval",
        ),
        ("info titan-mag", "unknown preset 'titan-mag', perhaps you meant 'titans-mag'"),
        ("info empty", "empty is not a model: it has no config.json"),
        ("info titans-mag --hidden-size 33", "hidden_size 33 is not a multiple of num_heads 4"),
        ("eval nowhere", "nowhere is not a model: config.json is missing"),
        ("eval broken", "model.safetensors is corrupt or truncated"),
        ("eval flipped", "model.safetensors is corrupt: its checksum differs: a byte has changed"),
        ("eval model --json text.txt", "--json text.txt exists and is not a file of curves"),
        ("eval model --json empty", "--json empty is a folder"),
        ("eval odd", "config.json is not valid JSON"),
        ("eval small", "its byte vocabulary (it has no tokenizer.json) has 256 ids, the model only 100"),
        ("eval model --text nowhere.txt", "No such file or folder: 'nowhere.txt'"),
        ("eval model --text empty.txt", "'empty.txt' is empty"),
        ("eval model --text text.txt --segment 0", "segment must be at least 1"),
        ("eval model --text text.txt --tokens 1", "--tokens must be at least 2"),
        ("eval model --conditions", "name at least one of --conditions"),
        ("generate model", "the prompt is empty"),
        ("generate model --prompt a --top-p 2", "top_p must be above 0 and at most 1, got 2.0"),
        ("generate model --prompt a --seed -1", "seed must be 0 or more"),
        ("generate model --prompt a --seed 99999999999999999999", "seed must be 0 or more and below 2^63"),
        (
            "generate model --prompt a --load-state no.state",
            "no.state does not exist; give the file of a stream's state",
        ),
        (
            "generate model --prompt a --save-state text.txt",
            "--save-state text.txt exists and is not a stream's",
        ),
        ("stream model text.txt --save-state text.txt", "--save-state text.txt exists and is not a stream's"),
        ("stream model text.txt --save-state model/model.safetensors", "exists and is not a stream's state"),
        ("stream model text.txt --save-state text.txt/s", "--save-state text.txt/s cannot be written"),
        ("stream model bad.gz", "bad.gz is damaged or not what its name says"),
        (
            "info titans-mag --hidden-size 1000000000",
            "out of memory; choose smaller sizes",
        ),
        ("info deep", "config.json is not valid JSON"),
        (
            "info strange",
            "config.json does not describe a valid model: Gate: bias must be a finite",
        ),
        ("generate model --prompt a --load-state text.txt", "text.txt is corrupt or truncated"),
        ("stream model nowhere.txt", "No such file: 'nowhere.txt'"),
        ("stream model empty.txt", "empty.txt is empty: nothing to read"),
        ("stream model empty", "empty is a folder"),
        ("stream model bad.xz", "bad.xz is damaged or not what its name says"),
        ("stream model cut.gz", "cut.gz is damaged or not what its name says"),
        ("stream model text.txt --threads -1", "--threads must be 0"),
        ("stream model text.txt --piece 0", "piece must be at least 1"),
        ("stream model text.txt --config none.yaml", "No such config file: none.yaml"),
        ("stream model text.txt --config", "--config must be followed by a YAML file"),
        ("eval model --text junk.bin", "'junk.bin' is not text: it has NUL bytes"),
        ("eval model --text text.txt --bins -1", "bins must be at least 1"),
        ("train --out r --text nowhere.txt", "No such file or folder: 'nowhere.txt'"),
        ("train --out r --text empty.txt", "'empty.txt' is empty"),
        ("train --out r --text junk.bin", "'junk.bin' is not text: it has NUL bytes"),
        ("train --out r --seed 99999999999999999999", "seed must be 0 or more and below 2^63"),
        ("train --out r --tokenizer nowhere.json", "No such tokenizer file: 'nowhere.json'"),
        ("train --out r --tokenizer text.txt", "'text.txt' is not a tokenizer file"),
        ("train --out r --model empty", "empty is not a model"),
        ("train --out r --preset titan-mag", "unknown preset 'titan-mag', perhaps you meant 'titans-mag'"),
        ("train --out r --pattern memry", "pattern must name one or more of"),
        ("train --out r --resume", "r holds no checkpoint"),
        ("train --out r --hidden-size -8", "hidden_size must be at least 1, got -8"),
        ("train --out r --num-heads 0", "num_heads must be at least 1, got 0"),
        ("train --out r --chunk-size -1", "chunk_size"),
        ("train --out r --window-size -1", "window_size must be at least 1, got -1"),
        ("train --out r --num-persistent -1", "num_persistent must be at least 0, got -1"),
        (
            "train --out r --preset titans-mac --window-size 8",
            "window_size is only used by layers of attention, mag",
        ),
        (
            "train --out r --preset transformer --chunk-size 4",
            "chunk_size is only used by layers of memory, mac, mag",
        ),
        ("train --out r --preset titans-mag --segment-size 64", "segment_size is only used by layers of mac"),
        ("train --out r --preset titans-lmm --num-persistent 2", "and this model has memory; omit it"),
        (
            "info titans-mag --memory mpl",
            "--memory: unknown memory 'mpl', perhaps you meant 'mlp'; known are matrix",
        ),
        (
            "info titans-mag --memory.dept 3",
            "--memory.dept: MLP has no 'dept', perhaps you meant 'depth'; it has",
        ),
        (
            "info deltanet --feature-map polynomal",
            "--feature-map: unknown feature-map 'polynomal', perhaps you meant 'polynomial'; known are identity",
        ),
        ("info titans-mag --memory.depth x", "--memory.depth must be a whole number, got 'x'"),
        (
            "info titans-mag --bias",
            "--bias must be followed by a name; known are l2, dot, l1, lp, l-inf, huber",
        ),
        ("info titans-mag --algorithm.momentum 3", "--algorithm.momentum must be true or false, got '3'"),
        (
            "info titans-mag --retention.towards up",
            "--retention.towards must be one of zero, initial, got 'up'",
        ),
        ("info titans-mag --retention elastic-net", "ElasticNet needs gamma; add --retention.gamma VALUE"),
        ("info titans-mag --gates.bias 3", "--gates.bias: write --gates.GATE.FIELD, such as --gates.lr.bias"),
        (
            "info titans-mag --gates.lrr.bias 3",
            "gates lrr are not read by this rule, which reads lr, momentum",
        ),
        ("info transformer --memory mlp", "memory is only used by layers of memory, mac, mag, mal, and this"),
        ("train --out r --bias huber --bias.delta much", "--bias.delta must be a number, got 'much'"),
        ("train --out r --bias my_choices:Own", "if you trust it, read it with trust_remote_code=True"),
        ("train --out r --model model --bias huber", "has its sizes already"),
        (
            "info titans-mac --window-size 8",
            "window_size is only used by layers of attention, mag, mal, and this model has mac",
        ),
        (
            "check-training titans-lmm --window-size 8",
            "window_size is only used by layers of attention, mag, mal",
        ),
        ("train --out r --steps 0", "--steps must be at least 1, got 0"),
        ("train --out r --batch-size -4", "--batch-size must be at least 1, got -4"),
        ("train --out r --seq-len -16", "--seq-len must be at least 1, got -16"),
        ("train --out r --accumulate 0", "--accumulate must be at least 1, got 0"),
        ("train --out r --checkpoint-every 0", "--checkpoint-every must be at least 1, got 0"),
        ("train --out r --lr nan", "--lr must be positive and finite, got nan"),
        ("train --out r --warmup -1", "--warmup must be at least 0 and finite, got -1"),
        ("train --out r --min-lr -0.1", "--min-lr must be at least 0 and finite, got -0.1"),
        ("train --out r --weight-decay -1", "--weight-decay must be at least 0 and finite, got -1"),
        ("train --out r --write-price -1", "--write-price must be at least 0 and finite, got -1"),
        ("train --out r --beta1 1", "--beta1 must be at least 0 and below 1, got 1"),
        ("train --out r --seed -1", "seed must be 0 or more and below 2^63, got -1"),
        ("train --out r --threads 1025", "--threads must be 0 (torch's default) to 1024, got 1025"),
        ("train --out r --threads -1", "--threads must be 0 (torch's default) to 1024, got -1"),
        ("demo --out r --threads -1", "--threads must be 0 (torch's default) to 1024, got -1"),
        ("demo --out r --seed -1", "seed must be 0 or more and below 2^63, got -1"),
        ("demo --out r --seed 99999999999999999999", "seed must be 0 or more and below 2^63"),
        ("demo --out r --needle-bytes 10", "--needle-bytes must be at least 4096, got 10"),
        ("demo --out r --reading-seconds 0", "--reading-seconds must be positive, got 0"),
    ],
)
def test_what_goes_wrong_is_one_clear_line(
    place: Path, line: str, reason: str, capsys: pytest.CaptureFixture[str]
):
    import gzip

    (place / "empty").mkdir()
    (place / "empty.txt").touch()
    (place / "junk.bin").write_bytes(bytes(range(256)) * 8)
    (place / "bad.xz").write_bytes(b"no xz at all")
    (place / "bad.gz").write_bytes(b"no gzip at all")
    (place / "cut.gz").write_bytes(gzip.compress(TEXT)[:-20])
    for name, config in (("deep", "[" * 100_000), ("strange", (place / "model/config.json").read_text())):
        (place / name).mkdir()
        (place / name / "config.json").write_text(config.replace('"bias": -5.0', '"bias": "x"'))
    if "broken" in line or "odd" in line or "small" in line:
        save_model(build(vocab_size=100 if "small" in line else 256), place / line.split()[1])
    if "broken" in line:
        file = place / "broken" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    if "flipped" in line:
        save_model(build(), place / "flipped")
        file = place / "flipped" / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    if "odd" in line:
        (place / "odd" / "config.json").write_text("{")
        (place / "odd" / "checksums.json").unlink()
    assert reason in refused(line, capsys)
    # Nothing was begun: at most a folder for tokens that there are none of.
    assert not [path for path in (place / "r").rglob("*") if path.is_file()]


RUN = (
    "train --out run --text text.txt --hidden-size 16 --num-hidden-layers 1 --num-heads 2 --window-size 8 "
    "--num-persistent 2 --chunk-size 4 --batch-size 1 --seq-len 16 --steps 2 --checkpoint-every 1"
)


@pytest.mark.parametrize(
    "file", ["training.json", "training.safetensors", "model.safetensors", "config.json"]
)
def test_a_truncated_checkpoint_is_one_clear_line(place: Path, file: str, capsys: pytest.CaptureFixture[str]):
    assert run(RUN) == 0
    path = place / "run" / "step-2" / file
    path.write_bytes(path.read_bytes()[:-20])
    before = {each: each.read_bytes() for each in (place / "run").rglob("*") if each.is_file()}
    err = refused(f"{RUN} --resume", capsys)
    assert file in err and "step-1 is older: move step-2 away to continue from it" in err
    assert {each: each.read_bytes() for each in (place / "run").rglob("*") if each.is_file()} == before


def test_a_run_that_cannot_begin_leaves_its_name_free(place: Path, capsys: pytest.CaptureFixture[str]):
    assert "Take a smaller batch or more text" in refused(f"{RUN} --batch-size 100000", capsys)
    assert run(RUN) == 0
    assert "--steps 1: the run has already made 2 steps" in refused(f"{RUN} --resume --steps 1", capsys)


def test_a_run_is_neither_overwritten_nor_resumed_as_another(place: Path, capsys: pytest.CaptureFixture[str]):
    assert run(RUN) == 0
    before = {each: each.read_bytes() for each in (place / "run").rglob("*") if each.is_file()}
    assert "run already holds a run (step-2); add --resume" in refused(RUN, capsys)
    assert "hidden_size 16, now 32" in refused(f"{RUN} --hidden-size 32 --resume", capsys)
    assert "not with model; the checkpoint holds its model" in refused(
        f"{RUN} --resume --model model", capsys
    )
    assert {each: each.read_bytes() for each in (place / "run").rglob("*") if each.is_file()} == before


def test_a_state_of_another_model_is_refused_and_kept(place: Path, capsys: pytest.CaptureFixture[str]):
    assert run("stream model text.txt --save-state s") == 0
    before = (place / "s").read_bytes()
    for line in ("stream twin text.txt", "generate twin --prompt a"):
        err = refused(f"{line} --load-state s --save-state s", capsys)
        assert "s belongs to another model" in err
        assert model_hash(build()) in err and model_hash(build("transformer")) in err
    assert (place / "s").read_bytes() == before
    (place / "s").write_bytes(before[:-50])
    assert "s is corrupt or truncated" in refused("stream model text.txt --load-state s", capsys)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("train --out r --hiden-size 16", "Unrecognized options: --hiden-size"),
        ("train --out r --steps many", "--steps"),
        ("train", "--out"),
        ("demo --foo", "Unrecognized options: --foo"),
        ("eval model --foo 3", "Unrecognized options: --foo"),
        ("eval model --segment x", "--segment"),
        ("eval model --conditions learning thawed", "thawed"),
        ("stream model", "FILE"),
    ],
)
def test_a_wrong_flag_is_named(line: str, reason: str, capsys: pytest.CaptureFixture[str]):
    assert run(line) == 2
    err = capsys.readouterr().err
    assert reason in err and "Traceback" not in err


def test_debug_shows_the_traceback(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert run("info nothing --debug") == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("MIRAS_DEBUG", "1")
    assert run("info nothing") == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("MIRAS_DEBUG", "0")
    refused("info nothing", capsys)


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def wrong(_: list[str]) -> int:
        raise RuntimeError("ours")

    monkeypatch.setitem(COMMANDS, "info", wrong)
    with pytest.raises(RuntimeError, match="ours"):
        main(["info"])


def test_a_closed_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "miras.cli", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


# YAML


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("segment: 7\nbins: 5\nconditions: [reset, frozen]\ntext: one.txt\ntwin: t\nwarm: null\n")
    found = parse(EvalOptions, "eval", ["m", "--bins", "9", "--config", str(file)])
    assert found == EvalOptions(
        model=Path("m"),
        segment=7,
        bins=9,
        conditions=("reset", "frozen"),
        text=("one.txt",),
        twin=Path("t"),
    )
    assert parse(EvalOptions, "eval", [f"--config={file}", "m", "--text", "a", "b"]).text == ("a", "b")


def test_yaml_is_read_as_flags_are(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "out: runs/a\nlr: 3e-4\nhidden-size: 64\ncarry: false\nneedle: true\npattern: [mag, memory]\n"
    )
    found = parse(TrainOptions, "train", ["--config", str(file), "--no-needle"])
    assert (found.out, found.lr, found.hidden_size) == (Path("runs/a"), 3e-4, 64)
    assert (found.carry, found.needle, found.pattern) == (False, False, ("mag", "memory"))
    file.write_text("")
    assert parse(InfoOptions, "info", ["x", "--config", str(file)]) == InfoOptions(model="x")


COMPOSED = (
    "--memory mlp --memory.depth 3 --bias huber --retention decay --retention.towards=initial "
    "--algorithm gradient-descent --algorithm.momentum --algorithm.step-bound 10 --gates.lr.bias -1.5 "
    "--gates.delta.link softplus --features.keys query --key-dim 63 --feature-map polynomial "
    "--feature-map.degree 1"
)
FILE = """
memory: {name: mlp, depth: 3}
bias: huber
retention: decay
retention.towards: initial
algorithm: {name: gradient-descent, momentum: true, step-bound: 10}
gates:
  lr: {bias: -1.5}
  delta: {link: softplus}
features: {keys: query}
key-dim: 63
feature-map: {name: polynomial, degree: 1}
"""


def test_a_rule_is_composed_by_flags_or_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "c.yaml"
    file.write_text(FILE)
    expected = preset(
        "titans-lmm",
        memory=miras.MLP(depth=3),
        bias=miras.Huber(),
        retention=miras.Decay(towards="initial"),
        algorithm=miras.GradientDescent(momentum=True, step_bound=10.0),
        gates={
            "lr": miras.Gate(scale=0.25, bias=-1.5, per_weight=True),
            "delta": miras.Gate("softplus", bias=0.5413),
        },
        features=miras.Features(keys="query"),
        key_dim=63,
        feature_map=miras.Polynomial(1),
    )
    for line in (
        COMPOSED,
        f"--config {file}",
        f"--config {file} --memory.depth 3",
        f"--config {file} --bias Huber",
    ):
        assert run(f"info titans-lmm --json {line}") == 0
        config = json.loads(capsys.readouterr().out)["config"]
        assert miras.ModelConfig.from_dict(config) == expected, line
    # What is not named is as the preset has it; another choice has its own defaults.
    for line, changed in (
        (
            "--algorithm.no-momentum --algorithm.step-bound 1",
            {"algorithm": miras.GradientDescent(step_bound=1.0)},
        ),
        ("--memory gated_mlp", {"memory": miras.GatedMLP()}),
        ("--memory MLP", {}),
    ):
        assert run(f"info titans-lmm --json {line}") == 0
        config = json.loads(capsys.readouterr().out)["config"]
        assert miras.ModelConfig.from_dict(config) == preset("titans-lmm", **changed), line
    assert choices.over({"memory": "mlp", "memory.depth": "3", "bias": "l2"}, {"memory": "matrix"}) == {
        "bias": "l2",
        "memory": "matrix",
    }


def test_help_names_every_choice_and_every_field_of_it():
    """Help reads them from the sources, because it imports no torch."""
    bases = {"memory": Memory, "bias": Bias, "retention": Retention, "algorithm": Algorithm}
    bases |= {"feature_map": FeatureMap}
    assert list(bases) == list(choices.AXES)
    for axis, base in bases.items():
        found = {kind: set(fields) for kind, fields in choices.choices(axis)}
        kinds = KINDS[base]
        assert found == {name: set(hints_of(kind)) for name, kind in kinds.items()}
    assert choices.choices("gates") == [("Gate", list(hints_of(miras.Gate)))]
    assert choices.choices("features") == [("Features", list(hints_of(miras.Features)))]
    assert "gradient-descent (momentum, step-bound," in choices.told() and "per-weight" in choices.told()


def test_a_composed_run_is_resumed_and_saved_with_its_rule(place: Path, capsys: pytest.CaptureFixture[str]):
    rule = "--memory mlp --memory.expansion 2 --bias huber --gates.lr.bias -1"
    assert run(f"{RUN} {rule}") == 0
    config = load_model("run/model").config
    assert config.memories()[0].rule.memory == miras.MLP(expansion=2)
    assert config.memories()[0].rule.bias == miras.Huber() and config.memories()[0].gates["lr"].bias == -1
    assert "rule" in refused("train --out run --resume --steps 3 --bias l1", capsys)
    meta = place / "run" / "step-2" / "training.json"
    told = json.loads(meta.read_text())
    (place / "run" / "step-2" / "checksums.json").unlink()
    older = {n: value for n, value in told["options"].items() if n not in ("rule", "conv_size")}
    meta.write_text(json.dumps(told | {"options": older}))  # as a version without these options wrote it
    assert "rule {}, now {'bias': 'l1'}" in refused("train --out run --resume --steps 3 --bias l1", capsys)
    meta.write_text(json.dumps(told))
    assert run("train --out run --resume --steps 3") == 0
    assert run("train --out run --resume --steps 4 --bias huber --memory.expansion 2") == 0
    assert load_model("run/model").config == config


def test_a_run_goes_on_with_the_alignment_that_it_began_with(place: Path):
    """Attention alone had that of a memory's chunks once, and now has none."""
    line = RUN.replace(" --chunk-size 4", "").replace("--num-persistent 2", "--preset transformer")
    assert run(line) == 0
    meta = place / "run" / "step-2" / "training.json"
    told = json.loads(meta.read_text())
    assert told["task"]["align"] == 1
    (place / "run" / "step-2" / "checksums.json").unlink()
    meta.write_text(json.dumps(told | {"task": told["task"] | {"align": 16}}))
    assert run("train --out run --resume --steps 3") == 0
    assert json.loads((place / "run/step-3/training.json").read_text())["task"]["align"] == 16


def test_a_flag_equal_to_its_default_is_given_all_the_same(place: Path):
    """Over a file, and over what a run was told when it began."""
    (place / "c.yaml").write_text("lr: 0.01\nwarmup: 3\n")
    assert parse(TrainOptions, "train", ["--out", "r", "--config", "c.yaml", "--lr", "0.003"]).lr == 0.003
    assert run(f"{RUN} --config c.yaml") == 0
    assert run("train --out run --resume --steps 3") == 0
    assert run("train --out run --resume --steps 4 --lr 0.003 --warmup 50") == 0
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [json.loads((place / f"run/step-{n}/training.json").read_text())["options"] for n in (3, 4)]
    assert [(each["lr"], each["warmup"]) for each in told] == [(0.01, 3), (0.003, 50)]
    assert len(rows) == 4 and rows[3]["lr"] < rows[2]["lr"]


def test_positional_values_may_come_from_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\n")
    assert parse(EvalOptions, "eval", ["--config", str(file)]).model == Path("m")
    assert parse(EvalOptions, "eval", ["n", "--config", str(file)]).model == Path("n")
    assert "so it must also give file, or neither" in refused(f"stream big.txt --config {file}", capsys)
    file.write_text("file: f\n")
    assert parse(StreamOptions, "stream", ["m", "--config", str(file)]) == StreamOptions(
        model=Path("m"), file="f"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("segmnt: 3", "unknown key 'segmnt', perhaps you meant 'segment'; known are model, text"),
        ("segment: three", "segment must be int, got 'three'"),
        ("segment: 2.5", "segment must be int, got 2.5"),
        ("segment: true", "segment must be int, got True"),
        ("conditions: [thawed]", "conditions must be tuple, got ['thawed']"),
        ("- segment", "must hold one `name: value` per line"),
        ("segment: [", "is not valid YAML"),
    ],
)
def test_wrong_yaml_is_one_clear_line(
    tmp_path: Path, text: str, reason: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "c.yaml").write_text(text)
    err = refused(f"eval model --config {tmp_path / 'c.yaml'}", capsys)
    assert reason in err and "c.yaml" in err


# Commands


def test_info(place: Path, capsys: pytest.CaptureFixture[str]):
    assert run("info model") == 0
    out = capsys.readouterr().out
    model = build()
    assert "2 x mag" in out and f"{model.num_parameters():,} parameters" in out
    assert "S_t = momentum_t S_{t-1} - b_t lr_t grad_t" in out and "0.9 sigmoid(x W + b)" in out
    assert run("info titans-lmm --hidden-size 64 --num-hidden-layers 3 --chunk-size 4 --json") == 0
    found = json.loads(capsys.readouterr().out)
    config = preset("titans-lmm", hidden_size=64, num_hidden_layers=3, chunk_size=4)
    assert found["config"] == json.loads(json.dumps(config.to_dict()))
    assert found["parameters"] == LM(config).num_parameters()
    assert run("info transformer --hidden-size 64") == 0
    out = capsys.readouterr().out
    assert "growing with every token" in out and "the memory" not in out


def test_eval(place: Path, capsys: pytest.CaptureFixture[str]):
    line = (
        "eval model --text text.txt --twin twin --segment 100 --warm 200 --tokens 600 --json out/curves.json"
    )
    assert run(line) == 0
    out = capsys.readouterr().out
    found = json.loads((place / "out" / "curves.json").read_text())
    assert found["model_hash"] == model_hash(build())
    names = ["learning", "frozen", "frozen-warmed", "reset", "twin"]
    assert [curve["name"] for curve in found["curves"]] == names
    ids = ByteTokenizer().encode(TEXT)[:600]
    for curve in found["curves"]:
        assert curve["num_tokens"] == curve["num_bytes"] == 599
        assert f"{curve['mean']:.4f}" in out
    losses = read(build(), ids).losses[0, 1:].astype(np.float64)
    assert found["curves"][0]["mean"] == pytest.approx(losses.mean() / np.log(2), rel=1e-6)
    losses = read(build("transformer"), ids).losses[0, 1:].astype(np.float64)
    assert found["curves"][4]["mean"] == pytest.approx(losses.mean() / np.log(2), rel=1e-6)


def test_eval_of_the_embedded_novel(place: Path, capsys: pytest.CaptureFixture[str]):
    assert run("eval model --conditions learning --tokens 300") == 0
    assert "299 tokens, 299 bytes scored" in capsys.readouterr().out


def test_generate_goes_on_from_a_saved_state(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "model", "--prompt", "Dear Pip,", "--tokens", "30", "--temperature", "0"]) == 0
    whole = capsys.readouterr().out
    start = ["generate", "model", "--prompt", "Dear Pip,", "--tokens", "12", "--temperature", "0"]
    assert main([*start, "--save-state", "s"]) == 0
    first = capsys.readouterr()
    assert "state after 21 tokens saved to s" in first.err
    assert run("generate model --tokens 18 --temperature 0 --load-state s") == 0
    second = capsys.readouterr().out
    if "\ufffd" not in whole:  # a character may be cut in two
        assert first.out[:-1] + second == whole
    state, _ = load_state("s", build())
    assert state.tokens.tolist() == [21]
    assert run("generate twin --tokens 5 --load-state s") == 2
    err = capsys.readouterr().err
    assert model_hash(build()) in err and model_hash(build("transformer")) in err


def test_stream_reads_files_and_standard_input_alike(place: Path, capsys: pytest.CaptureFixture[str]):
    import lzma

    (place / "text.xz").write_bytes(lzma.compress(TEXT))
    told = []
    for name in ("text.txt", "text.xz"):
        assert run(f"stream model {name} --save-state {name}.state --piece 100") == 0
        told.append(capsys.readouterr().out)
    command = [sys.executable, "-m", "miras.cli", "stream", "model", "-", "--save-state", "in.state"]
    done = subprocess.run([*command, "--piece", "100"], input=TEXT, capture_output=True)
    assert done.returncode == 0, done.stderr
    told.append(done.stdout.decode())
    found = read(build(), ByteTokenizer().encode(TEXT), piece=100)
    bits = np.nanmean(found.losses.astype(np.float64)) / np.log(2)
    for out in told:
        assert f"900 tokens, {bits:.4f} bits per byte" in out and "state after 900 tokens saved" in out
    wanted = found.state.tensors()
    for name in ("text.txt.state", "text.xz.state", "in.state"):
        state, header = load_state(name, build())
        assert header.tokens == (900,)
        for key, value in state.tensors().items():
            torch.testing.assert_close(value, wanted[key], msg=key)


def test_stream_goes_on_and_need_not_learn(place: Path, capsys: pytest.CaptureFixture[str]):
    model = build()
    assert run("stream model text.txt --save-state a") == 0
    assert run("stream model text.txt --load-state a --save-state b --no-write") == 0
    assert "900 tokens after 900 earlier" in capsys.readouterr().out
    (a, _), (b, _) = load_state("a", model), load_state("b", model)
    assert b.tokens.tolist() == [1800]
    before, after = a.tensors(), b.tensors()
    memories = [name for name in before if ".A." in name]
    assert memories and all(torch.equal(before[name], after[name]) for name in memories)


@pytest.mark.parametrize("saves", [True, False])
def test_ctrl_c_says_what_was_saved(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, saves: bool
):
    pieces = commands.read_pieces

    def stopped(*arguments: object, **options: object):
        for part in pieces(*arguments, **options):  # pyright: ignore
            yield part
            if part.start >= 200:
                raise KeyboardInterrupt

    monkeypatch.setattr(commands, "read_pieces", stopped)
    assert run("stream model text.txt --piece 104" + " --save-state s" * saves) == 130
    err = capsys.readouterr().err
    assert "miras: stopped; 312 tokens were read; " in err
    if saves:
        assert "state after 312 tokens saved to s" in err
        assert load_state("s", build())[1].tokens == (312,)
    else:
        assert "nothing was saved (no --save-state)" in err and not (place / "s").exists()


def test_ctrl_c_while_generating(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def say(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "say", say)
    assert run("generate model --prompt abc --save-state s") == 130
    assert "stopped; state after 4 tokens saved to s" in capsys.readouterr().err


def test_a_tokenizer_in_the_folder_is_used(place: Path, capsys: pytest.CaptureFixture[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    made.train_from_iterator([TEXT.decode(errors="ignore")], trainer)
    model = build(vocab_size=300)
    save_model(model, place / "bpe", extra={"tokenizer.json": made.to_str().encode()})
    _, tokenizer = commands.open_model(place / "bpe")
    assert tokenizer.vocab_size == 300
    ids = tokenizer.encode(TEXT)
    # Blocks of any size are cut where words end, so that the tokens are those of the whole.
    for size in (1, 10, 1000):
        blocks = iter([TEXT[at : at + size] for at in range(0, len(TEXT), size)])
        assert np.concatenate(list(source.text_tokens(blocks, tokenizer))).tolist() == ids.tolist()
    assert run("stream bpe text.txt") == 0
    out = capsys.readouterr().out
    nats = np.nansum(read(model, ids).losses, dtype=np.float64)
    bits = float(out.split(" bits per byte")[0].split()[-1])
    assert out.startswith(f"{len(ids)} tokens") and bits == pytest.approx(nats / np.log(2) / 900, rel=5e-3)
    assert run("eval bpe --text text.txt --conditions learning --twin model") == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert main(["generate", "bpe", "--prompt", "a b", "--tokens", "5"]) == 0


def test_a_text_without_spaces_is_not_held_back(monkeypatch: pytest.MonkeyPatch):
    class Other:
        sizes: ClassVar[list[int]] = []
        fingerprint, vocab_size = "other", 256

        def encode(self, text: bytes) -> np.ndarray:
            text.decode()  # whole characters only
            self.sizes.append(len(text))
            return np.frombuffer(text, dtype=np.uint8).astype(np.int64)

    monkeypatch.setattr(source, "BLOCK", 10)
    data = "語".encode() * 400
    blocks = iter([data[at : at + 10] for at in range(0, len(data), 10)])
    ids = np.concatenate(list(source.text_tokens(blocks, Other())))  # pyright: ignore
    assert ids.astype(np.uint8).tobytes() == data and max(Other.sizes) <= 180


def test_control_characters_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    commands.say("a\x1b[2Jb\n")
    assert capsys.readouterr().out == "a\x1b[2Jb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    commands.say("a\x1b[2Jb\n\té語")
    assert capsys.readouterr().out == "a[2Jb\n\té語"


def test_the_systems_end_is_like_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def ended(arguments: list[str]) -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(COMMANDS, "info", ended)
    assert run("info x") == 130
    assert capsys.readouterr().err == "\nmiras: stopped\n"
    assert signal.getsignal(signal.SIGTERM) is before

    def twice(arguments: list[str]) -> int:
        try:
            return ended(arguments)
        finally:
            signal.raise_signal(signal.SIGTERM)  # while it saves
            saved.append(True)

    saved: list[bool] = []
    monkeypatch.setitem(COMMANDS, "info", twice)
    assert run("info x") == 130 and saved == [True]
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as nohup's kin ask for
        assert run("info x") == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_there_is_replaced_only_by_its_like(place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "empty").touch()
    (place / "link").symlink_to(place / "kept")
    (place / "lost").symlink_to("/proc/nowhere/x")
    for state in ("empty", "link", "link"):  # an empty file, a link to nothing yet, and then to a state
        assert run(f"stream model text.txt --save-state {state}") == 0
        assert load_state(place / state, build())[1].tokens == (900,)
    assert (place / "link").is_symlink() and (place / "kept").is_file()
    for state in ("lost", "x" * 250):
        assert "cannot be written" in refused(f"stream model text.txt --save-state {state}", capsys)
    for _ in range(2):
        assert run("eval model --text text.txt --json curves.json --conditions learning") == 0
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_a_yaml_of_aliases_is_refused(place: Path, capsys: pytest.CaptureFixture[str]):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    (place / "bomb.yaml").write_text("\n".join(lines))
    assert "bomb.yaml has a YAML alias" in refused("train --config bomb.yaml --out r", capsys)


@pytest.mark.parametrize("data", ["--text text.txt", "--needle"])
def test_a_step_that_no_memory_holds_is_refused(place: Path, capsys: pytest.CaptureFixture[str], data: str):
    said = refused(f"train --out r {data} --seq-len 100000000 --batch-size 8", capsys)
    assert "a step needs at least" in said and "use fewer tokens per step" in said


def test_check_training_says_what_it_measured_and_what_is_out_of_range(tmp_path, capsys):
    sizes = ["--steps", "20", "--batch-size", "1", "--seq-len", "64", "--hidden-size", "32", "--threads", "1"]
    file = tmp_path / "check.json"
    status = main(["check-training", "titans-lmm", *sizes, "--no-reference", "--json", str(file)])
    said = capsys.readouterr().out
    assert status == 0
    assert "outer gradient" in said and "|W|, layers.1" in said and "Everything is in range." in said
    found = json.loads(file.read_text())
    assert len(found["loss"]) == 20 and found["problems"] == [] and found["reference"] is None
    # Twenty steps of 64 bytes are too few for a loss beside a reference.
    assert main(["check-training", "titans-lmm", *sizes, "--lr", "1e-6", "--json", str(file)]) in (0, 1)
    assert "Gated DeltaNet" in capsys.readouterr().out


def test_check_training_refuses_before_it_works(tmp_path, capsys):
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    for line, reason in (
        ("check-training titans-lm", "perhaps you meant 'titans-lmm'"),
        ("check-training transformer", "no memory"),
        ("check-training titans-lmm --steps 3", "at least 20 steps"),
        (f"check-training titans-lmm --json {other}", "is not a check's JSON"),
        (f"check-training {tmp_path}", "it has no config.json"),
    ):
        assert main(line.split()) == 2
        assert reason in capsys.readouterr().err
    assert other.read_text() == "mine"
