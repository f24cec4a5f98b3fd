"""Training: exact resumption, interruption, diagnosis, and the parts of the loop."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from miras.cli import main
from miras.core.bias import Bias
from miras.data.needle import Curriculum, NeedleTask
from miras.data.tokens import ByteTokenizer, FileTokenizer
from miras.nn.attention import AttentionConfig
from miras.nn.folder import load_model, save_model
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.train.checkpoint import checkpoints, load_checkpoint, read_meta
from miras.train.diagnose import first_non_finite
from miras.train.loop import NonFiniteError, Run, _needed
from miras.train.optimizer import parameter_groups, schedule
from miras.train.options import Settings, TrainOptions
from miras.train.price import openness
from miras.train.run import WINDOW, _task, train
from miras.train.tasks import NeedleTraining, TextTask, as_tensors
from miras.zoo import attention_twin, match_size, parameters, preset

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "window_size": 8, "num_persistent": 2}
SMALL = {"chunk_size": 4, **TINY}


def options(out: Path, **changes) -> TrainOptions:
    values = {
        "out": out,
        "steps": 9,
        "batch_size": 2,
        "seq_len": 16,
        "checkpoint_every": 4,
        "warmup": 2,
        **SMALL,
    }
    return TrainOptions(**(values | changes))


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("extra", [{}, {"accumulate": 2}, {"carry": False}, {"needle": True, "seq_len": 128}])
def test_a_resumed_run_is_the_run_that_did_not_stop(tmp_path, extra):
    assert train(options(tmp_path / "whole", **extra)) == 0
    stopped = options(tmp_path / "parts", **extra, checkpoint_every=5)
    assert train(dataclasses.replace(stopped, steps=9)) == 0
    # What a crash after step 7 leaves: a checkpoint of step 5 and metrics beyond it.
    for path in checkpoints(stopped.out):
        if path.name != "step-5":
            (path / "training.json").rename(path / "gone")
            path.rename(path.with_name("dropped" + path.name))
    assert train(dataclasses.replace(stopped, resume=True)) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    a, b = (load_model(tmp_path / name / "model").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_every_metric_is_in_the_table_of_the_document(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "training.md"
    told = re.findall(r"^\| `(\w+)` \|([^|]*)\|([^|]*)\|$", page.read_text(), re.M)
    assert all(meaning.strip() for _, _, meaning in told)
    for needle, length in ((False, 16), (True, 128)):
        out = tmp_path / str(needle)
        assert train(options(out, steps=1, needle=needle, seq_len=length)) == 0
        (row,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        assert list(row) == [name for name, _, meaning in told if needle or "--needle" not in meaning]


def test_the_loss_that_is_shown_is_a_plain_mean(tmp_path, capsys):
    """An average that starts at the first loss, near the largest there is, is too high for a hundred steps."""
    assert train(options(tmp_path, steps=60, warmup=1, checkpoint_every=100)) == 0
    said = capsys.readouterr().err
    shown = dict(re.findall(r"step (\d+)/60  loss ([\d.]+)", said))
    found = losses(tmp_path)
    assert f"means over the last {WINDOW} steps" in said
    for step in (3, 60):
        last = found[max(0, step - WINDOW) : step]
        assert float(shown[str(step)]) == pytest.approx(sum(last) / len(last), abs=6e-4)


def test_a_state_that_would_grow_is_not_carried(tmp_path, capsys):
    whole = options(tmp_path, preset="transformer", window_size=None, num_persistent=None, chunk_size=None)
    assert train(dataclasses.replace(whole, steps=4)) == 0
    assert "each step starts with a new state (--window-size bounds it)" in " ".join(
        capsys.readouterr().err.split()
    )
    _, tensors, meta = load_checkpoint(checkpoints(tmp_path)[-1])
    assert not [name for name in tensors if name.startswith("lanes")] and not any(meta["lanes"])
    assert train(dataclasses.replace(whole, resume=True)) == 0
    assert len(losses(tmp_path)) == 9


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    code = (
        "import sys; from pathlib import Path; from miras.train.options import TrainOptions;"
        "from miras.train.run import WINDOW, _task, train;"
        f"sys.exit(train(TrainOptions(out=Path({str(tmp_path / 'run')!r}), steps=100000, batch_size=1,"
        f" seq_len=16, threads=1, **{SMALL!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "--resume" in said and "Traceback" not in said
    last = checkpoints(tmp_path / "run")[-1]
    _, _, meta = load_checkpoint(last)
    assert meta["step"] == len(losses(tmp_path / "run"))


def test_a_loss_that_is_not_finite_stops_and_names_where(tmp_path, capsys):
    assert train(options(tmp_path, steps=4)) == 0
    model = load_model(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mixer.memory.v.conv[:8] = 1e38  # head 0 of the second layer overflows
    run = Run(
        model, TextTask(np.arange(200) % 251, batch_size=1, seq_len=16, align=4, seed=0), Settings(steps=4)
    )
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"layers\.1.*head 0.*token 0"):
        run.advance()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_what_is_not_finite_is_not_saved(tmp_path, monkeypatch, capsys):
    """Weights that a step's update broke: the next forward pass is not finite, so there is nothing to go on from."""
    real = Run.advance

    def overflow(self):
        row = real(self)
        if self.step == 8:
            with torch.no_grad():
                self.model.model.layers[0].mlp.up.weight[0] = torch.inf
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", overflow)
        assert train(options(tmp_path)) == 1
    assert "last good checkpoint is" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0", "step-4"]
    assert train(options(tmp_path, resume=True)) == 0


def test_a_checkpoint_that_is_not_good_is_told(tmp_path, monkeypatch, capsys):
    """Versions that did not look wrote such ones."""
    assert train(options(tmp_path, steps=4)) == 0
    newest = checkpoints(tmp_path)[-1]
    task = _task(options(tmp_path), load_model(newest).config, ByteTokenizer())
    run = Run.load(newest, task, Settings(steps=9))
    with torch.no_grad():
        run.model.model.layers[0].mlp.up.weight[0] = torch.inf
    run.save(tmp_path, read_meta(newest)["options"], {}, keep=2)
    assert train(options(tmp_path, resume=True)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "step-4 is not finite either. Move it away" in said and said.endswith("step-0.")


def test_the_command_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    real = Run.advance

    def overflow(self):
        if self.step == 6:
            with torch.no_grad():
                self.model.model.layers[0].mlp.up.weight[0] = torch.inf
        return real(self)

    monkeypatch.setattr(Run, "advance", overflow)
    assert train(options(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "model.layers.0.mlp.up.weight" in said and "step-4" in said.replace("\n", "")
    assert checkpoints(tmp_path)[-1].name == "step-4"
    model, _, _ = load_checkpoint(checkpoints(tmp_path)[-1])
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_first_bad_number_is_found_wherever_it_arises():
    torch.manual_seed(0)
    model = LM(preset("swa-lmm", vocab_size=256, **SMALL))
    tokens = torch.arange(24)[None]
    assert "no value" in first_non_finite(model, tokens, None)
    state = model(tokens)[1]
    bad = state.layers[1].memory.A["w1"].clone()
    bad[0, 1] = torch.nan
    memory = dataclasses.replace(state.layers[1].memory, A=state.layers[1].memory.A | {"w1": bad})
    state = dataclasses.replace(
        state, layers=(state.layers[0], dataclasses.replace(state.layers[1], memory=memory))
    )
    assert "layers.1, head 1, token 0" in first_non_finite(model, tokens, state)


@pytest.mark.parametrize("file", ["training.safetensors", "model.safetensors", "training.json"])
def test_a_corrupt_checkpoint_is_refused_by_name(tmp_path, file):
    assert train(options(tmp_path, steps=4)) == 0
    path = checkpoints(tmp_path)[-1] / file
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=path.parent.name):
        load_checkpoint(path.parent)
    if file == "training.safetensors":
        data[-3] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="corrupt"):
            load_checkpoint(path.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"seq_len": 18}, "multiple"),
        ({"preset": "titan-mag"}, "perhaps you meant 'titans-mag'"),
        ({"lr": -1.0}, "--lr must be positive"),
        ({"resume": True}, "holds no checkpoint"),
        ({"text": ("no-such-file.txt",)}, "no-such-file.txt"),
        ({"needle": True, "text": ("a.txt",)}, "--needle"),
        ({"pattern": ("memry",)}, "memry"),
        ({"model": Path("no-such-model")}, "no-such-model"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(options(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@dataclasses.dataclass(frozen=True)
class Halved(Bias):
    """A choice that the library does not have."""

    def loss(self, pred, target, gates):
        return (pred - target).square().sum(-1) / 4


def test_a_model_that_names_code_is_trained_and_resumed_only_with_trust(tmp_path):
    save_model(LM(preset("yaad", bias=Halved()).changed(SMALL)), tmp_path / "model")
    begin = {"model": tmp_path / "model", "steps": 2, **dict.fromkeys(SMALL)}
    with pytest.raises(ValueError, match="--trust-remote-code"):
        train(options(tmp_path / "run", **begin))
    assert not (tmp_path / "run").exists()
    assert train(options(tmp_path / "run", **begin, trust_remote_code=True)) == 0
    rest = begin | {"steps": 3, "resume": True}
    with pytest.raises(ValueError, match="--trust-remote-code"):
        train(options(tmp_path / "run", **rest))
    assert train(options(tmp_path / "run", **rest, trust_remote_code=True)) == 0
    trained = load_model(tmp_path / "run" / "model", trust_remote_code=True)
    assert trained.config.memories()[0].rule.bias == Halved()


def test_a_run_is_resumed_without_saying_again_what_it_is(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one text to learn " * 60)
    text = (str(tmp_path / "a.txt"),)
    assert train(options(tmp_path / "whole", text=text, lr=2e-3, pattern=("attention", "memory"))) == 0
    stopped = options(tmp_path / "parts", text=text, lr=2e-3, pattern=("attention", "memory"))
    assert train(stopped) == 0
    newest = checkpoints(stopped.out)[-1]
    (newest / "training.json").rename(newest / "gone")
    newest.rename(newest.with_name("dropped"))
    resume = ["train", "--out", str(stopped.out), "--resume"]
    assert main(resume) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    # What is said counts: more steps, and what cannot change is refused.
    assert main([*resume, "--steps", "11"]) == 0
    assert len(losses(stopped.out)) == 11
    capsys.readouterr()
    assert main([*resume, "--num-heads", "4"]) == 2 and "num_heads 2, now 4" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten_nor_resumed_as_another(tmp_path):
    assert train(options(tmp_path, steps=4)) == 0
    with pytest.raises(ValueError, match="add --resume"):
        train(options(tmp_path, steps=4))
    with pytest.raises(ValueError, match="hidden_size 16, now 32"):
        train(options(tmp_path, resume=True, hidden_size=32))


def test_a_tokenizer_file_in_place_of_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    text = "the memory learns while it reads. " * 40
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(text)
    file = tmp_path / "tokenizer.json"
    assert train(options(tmp_path / "run", text=(str(tmp_path / "a.txt"),), tokenizer=file, steps=2)) == 0
    tokenizer = FileTokenizer(tmp_path / "run" / "model")
    model = load_model(tmp_path / "run" / "model")
    assert model.config.vocab_size == tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text.strip()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    ratio = len(text) / len(tokenizer.encode(text))
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / np.log(2) / ratio, rel=0.05)


def test_micro_batches_add_up_to_the_gradient_of_one_batch():
    tokens = np.random.default_rng(0).integers(0, 256, 600)
    config = preset("titans-mag", vocab_size=256, **SMALL)
    gradients = []
    for rows, micro in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        task = TextTask(tokens, batch_size=rows, seq_len=16, align=4, seed=0, micro_batches=micro)
        run = Run(LM(config), task, Settings(steps=1, clip=1e9))
        run.advance()
        gradients.append([p.grad for p in run.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_carried_states_go_on_where_the_text_does():
    tokens = np.random.default_rng(0).integers(0, 256, 300)
    torch.manual_seed(0)
    model = LM(preset("titans-mag", vocab_size=256, **SMALL))
    task = TextTask(tokens, batch_size=1, seq_len=16, align=4, seed=0)
    run = Run(model, task, Settings(steps=3, lr=1e-12, own_lr=1.0, weight_decay=0.0))
    carried = [run.advance()["loss"] for _ in range(3)]
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(tokens[None, :48]))
    nats = torch.nn.functional.cross_entropy(logits[0], torch.from_numpy(tokens[1:49]), reduction="none")
    assert carried == pytest.approx(nats.view(3, 16).mean(1).tolist(), rel=1e-5)


def test_weight_decay_and_learning_rates_go_where_they_should():
    model = LM(preset("titans-mag", vocab_size=256, **SMALL))
    matrices, own = parameter_groups(model, 1.0, 0.5, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (matrices, own))
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert own["weight_decay"] == 0 and own["lr"] == 0.5 and matrices["weight_decay"] == 0.1
    for name in kept:
        assert any(part in name for part in ("norm", "gates", "A0", "conv", "persistent", "embed")), name
    for name in decayed:
        assert name.endswith("weight") and "norm" not in name and "gates" not in name, name


def test_the_schedule_warms_up_and_falls_to_its_floor():
    shares = [schedule(step, 100, 10, 0.1) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == 1.0 and shares[9] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(shares[9:]))
    assert schedule(100, 100, 10, 0.1) == pytest.approx(0.1)


def test_the_price_closes_the_gates():
    config = preset("swa-lmm", vocab_size=256, gates={"lr": Gate(link="hard")}, **SMALL)
    opened = []
    for price in (0.0, 50.0):
        torch.manual_seed(0)
        task = TextTask(np.arange(400) % 7, batch_size=2, seq_len=16, align=4, seed=0)
        run = Run(LM(config), task, Settings(steps=30, warmup=1, lr=1e-2, write_price=price))
        rows = list(run.until(30))
        opened.append(rows[-1]["open"])
    assert opened[1] < 0.5 * opened[0]
    with openness(LM(preset("transformer", vocab_size=256, hidden_size=16, num_heads=2))) as gates:
        assert gates.mean() == 0


def test_bf16_trains_and_its_memory_stays_exact():
    torch.manual_seed(0)
    model = LM(preset("titans-mag", vocab_size=256, **SMALL))
    task = TextTask(np.arange(400) % 7, batch_size=2, seq_len=16, align=4, seed=0)
    run = Run(model, task, Settings(steps=20, warmup=1, lr=1e-2, bf16=True))
    rows = list(run.until(20))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    memory = run.task.states[0].layers[0].memory.memory
    assert all(x.dtype == torch.float32 for x in memory.A.values())


def test_needles_get_longer_with_success_and_are_paid_for():
    task = NeedleTraining(tokens_per_step=512, seed=0)
    batch = task.batch(0, 0)
    assert batch.tokens.shape == (4, 128) and not task.asks_price()
    for step in range(30):
        batch = task.batch(step, 0)
        row = task.finished(step, batch, torch.from_numpy(batch.targets))
    assert row["longest"] > 128 and task.asks_price()
    again = NeedleTraining(tokens_per_step=512, seed=0)
    again.restore(json.loads(json.dumps(task.to_dict())))
    assert again.curriculum == task.curriculum and again.priced
    with pytest.raises(ValueError, match="trained on 'needle'"):
        TextTask(np.arange(100), batch_size=1, seq_len=16, align=4, seed=0).restore(task.to_dict())


def test_masks_that_say_nothing_are_left_out_and_change_nothing():
    torch.manual_seed(0)
    model = LM(preset("swa-lmm", vocab_size=256, **SMALL)).double()
    batch = as_tensors(NeedleTask(100).batch(0, 0, 2))
    assert _needed(batch, True) == {}
    assert set(_needed(batch, False)) == {"reset"}, "a carried state is forgotten there"
    later, short = batch["reset"].clone(), batch["valid"].clone()
    later[1, 40] = True
    short[0, 90:] = False
    assert set(_needed(batch | {"reset": later}, True)) == {"reset"}
    assert set(_needed(batch | {"valid": short}, True)) == {"valid"}
    with_masks = model.hidden(batch["tokens"], None, valid=batch["valid"], reset=batch["reset"])[0]
    torch.testing.assert_close(with_masks, model.hidden(batch["tokens"], None)[0], rtol=1e-12, atol=1e-12)


def test_a_crowd_of_needles_grows_with_the_context():
    task = NeedleTraining(tokens_per_step=2048, curriculum=Curriculum(lengths=(512,)), crowd=3)
    answers = {int(task.batch(step, 0).weight[0].sum()) // 5 for step in range(20)}
    assert answers == {1, 2, 3}
    many = NeedleTraining(tokens_per_step=2048, curriculum=Curriculum(lengths=(512,)), crowd=4, least=3)
    assert {int(many.batch(step, 0).weight[0].sum()) // 5 for step in range(20)} == {3, 4}
    short = NeedleTraining(tokens_per_step=2048, curriculum=Curriculum(lengths=(128,)), crowd=4, least=3)
    assert {int(short.batch(step, 0).weight[0].sum()) // 5 for step in range(20)} == {1}
    batch = task.batch(0, 0)
    one = int(np.flatnonzero(batch.weight[0])[0])
    predicted = torch.from_numpy(batch.targets.copy())
    predicted[0, one] ^= 1
    row = task.finished(0, batch, predicted)
    assert row["accuracy"] == 1 - 5 / batch.weight.sum(), "one answer of all is wrong"


def test_the_twin_has_the_same_size_and_no_memory():
    config = preset("titans-mag", vocab_size=256, hidden_size=64, window_size=8, num_persistent=2)
    count = lambda c: LM(c).num_parameters()  # noqa: E731
    twin = attention_twin(config)
    assert twin.pattern == (AttentionConfig(window_size=8, num_persistent=2),)
    assert count(twin) == pytest.approx(count(config), rel=0.01)


def test_another_model_is_made_as_large():
    wanted = parameters(preset("titans-mag", hidden_size=64, window_size=8, num_persistent=2))
    for name in ("gated-deltanet", "swa"):
        config = match_size(preset(name, hidden_size=64), wanted)
        assert LM(config).num_parameters() == parameters(config) == pytest.approx(wanted, rel=0.01)
    assert match_size(config, 1).inner() == 2
