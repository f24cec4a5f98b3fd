"""`miras train`: from options to a trained model folder, with a live bar, metrics and
checkpoints."""

import dataclasses
import json
import math
import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from miras.data.novel import load_novel
from miras.data.tokens import Tokenizer, load_tokenizer, prepare
from miras.nn.compose import composed
from miras.nn.config import ModelConfig
from miras.nn.folder import load_model, read_config, save_model
from miras.nn.lm import LM
from miras.nn.threads import check_seed, set_threads
from miras.store.files import naming, write_atomically, write_whole
from miras.store.lock import hold
from miras.store.signals import Held, nobody_reads
from miras.stream.terminal import Plain, size_text
from miras.train.checkpoint import checkpoints, read_checkpoint_config, read_meta
from miras.train.loop import NonFiniteError, Run
from miras.train.options import Settings, TrainOptions
from miras.train.tasks import NeedleTraining, Task, TextTask
from miras.zoo import override, preset

INTERRUPTED = 130
FAILED = 1

# Options that may differ between a run and its continuation without changing the results.
_FREE = ("out", "resume", "threads", "checkpoint_every", "keep", "cache", "model", "trust_remote_code")

# Options that a continuation must be given again: the folder, and what is trusted.
_TOLD = ("out", "resume", "model", "trust_remote_code")

_PATHS = ("tokenizer", "cache")


def train(options: TrainOptions) -> int:
    """Train with the given options; returns the exit status (0, 1 for a non-finite loss, 130 if
    interrupted)."""
    console = Plain(stderr=True, soft_wrap=True)
    _check(options)
    set_threads(options.threads)
    advice = "a run can have one writer at a time: wait for it, or choose another --out"
    with hold(options.out / "run", advice, str(options.out)):
        _check(options)  # what another process may have written here meanwhile
        return _train(options, console)


def _train(options: TrainOptions, console: Console) -> int:
    """Train in a folder that is locked for this process."""
    tokenizer = load_tokenizer(options.tokenizer)
    config = model_config(options, tokenizer.vocab_size)
    said = _plain(options)
    if options.carry and config.grows():
        if not options.resume:
            console.print(
                "Full attention: a carried state would grow with every token, so each step starts with a new state "
                "(--window-size bounds it)."
            )
        options = dataclasses.replace(options, carry=False)
    _check_memory(options, config)
    task = _task(options, config, tokenizer)
    run = _begin(options, config, task)
    extra = tokenizer.files()
    metrics = Metrics(options.out / "metrics.jsonl", run.step)
    # also if it was torch's default, which may differ elsewhere
    said["threads"] = torch.get_num_threads()
    if options.resume:  # the model it started with, also if it continues without naming it
        said["model"] = read_meta(checkpoints(options.out)[-1])["options"].get("model")
    console.print(
        f"{said['model'] or options.preset}: {run.model.num_parameters():,} parameters, "
        f"step {run.step} of {options.steps}, {options.out}"
    )

    if metrics.missing:
        console.print(
            f"{metrics.path} lacks {metrics.missing:,} of the {run.step:,} steps before this one: a machine "
            "that stopped had not written them yet. Training still continues exactly."
        )

    def save() -> Path:
        run.check()  # so that a forward pass from every checkpoint is finite
        metrics.sync()
        return run.save(options.out, said, extra, options.keep)

    # A signal waits for the end of the step and of the save after it.
    with Held() as stops:
        try:
            if run.step == 0:
                save()
            with progress(console, options.steps, run) as show:
                for row in run.until(options.steps):
                    metrics.add(row)
                    show(row)
                    if run.step % options.checkpoint_every == 0 and run.step < options.steps:
                        save()
                    if stops.came:
                        break
            path = save()
            if run.step == options.steps:
                save_model(run.model, options.out / "model", extra)
            stops.over()
        except NonFiniteError as error:
            console.print(f"stopped: {error}", style="bold red")
            console.print(_way_on(options.out, run))
            return FAILED
        except OSError as error:
            if nobody_reads(error):
                save()
            raise
        finally:
            metrics.close()
    if run.step < options.steps:
        console.print(
            f"Interrupted. {path} has everything: `miras train --out {shlex.quote(str(options.out))} --resume` "
            f"continues from there."
        )
        return INTERRUPTED
    console.print(f"The model is {options.out / 'model'}; what each step did is in {metrics.path}.")
    return 0


def _way_on(out: Path, run: Run) -> str:
    """What to do after a non-finite value; a checkpoint is good if a forward pass from it is
    finite."""
    *older, newest = checkpoints(out) or [None]
    try:
        if newest is not None and read_meta(newest)["step"] == run.step:
            run.check()
    except NonFiniteError:  # an older version wrote it
        if not older:
            return f"{newest} is not finite either: start again with a lower --lr or --clip."
        return (
            f"{newest} is not finite either. Move it away, lower --lr or --clip, and add --resume to continue from "
            f"{older[-1]}."
        )
    if newest is None:
        return "Nothing was saved: the model that training started with is not finite."
    return f"The last good checkpoint is {newest}; lower --lr or --clip and add --resume to continue from it."


def begun(out: Path) -> dict[str, Any]:
    """The options a run was started with, as `TrainOptions`, so that `--out RUN --resume`
    suffices."""
    there = checkpoints(out) if out.exists() else []
    before = read_meta(there[-1])["options"] if there else {}
    found: dict[str, Any] = {}
    for f in dataclasses.fields(TrainOptions):
        if f.name in before and f.name not in _TOLD:
            value: Any = before[f.name]
            if f.name in _PATHS and value is not None:
                value = Path(value)
            found[f.name] = tuple(value) if isinstance(value, list) else value
    return found


def _plain(options: TrainOptions) -> dict[str, Any]:
    """The options as plain JSON."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def _check(options: TrainOptions) -> None:
    """Refuse invalid options before any work starts."""
    for name in ("steps", "batch_size", "seq_len", "accumulate", "checkpoint_every", "keep"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    for name in ("lr", "clip", "own_lr"):
        # An infinite clip means no clipping.
        if not 0 < getattr(options, name) < math.inf and (name, options.clip) != ("clip", math.inf):
            raise ValueError(
                f"--{name.replace('_', '-')} must be positive and finite, got {getattr(options, name)}"
            )
    for name in ("warmup", "min_lr", "weight_decay", "write_price", "write_price_from"):
        if not 0 <= getattr(options, name) < math.inf:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 0 and finite, got {getattr(options, name)}"
            )
    check_seed(options.seed)
    if "" in options.text:
        raise ValueError("--text has an empty name (a variable that is not set?); name a file or a folder")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 0 and below 1, got {getattr(options, name)}")
    if options.needle and (options.text or options.tokenizer):
        raise ValueError("--needle generates its own text in bytes; omit --text and --tokenizer")
    there = checkpoints(options.out) if options.out.exists() else []
    if there and not options.resume:
        raise ValueError(
            f"{options.out} already holds a run ({there[-1].name}); add --resume to continue it, or choose "
            f"another --out"
        )
    if options.resume and not there:
        raise ValueError(f"--resume: {options.out} holds no checkpoint; omit --resume to start")
    if options.resume:
        meta = read_meta(there[-1])
        # An option that an older version did not have had its default.
        before = _plain(TrainOptions(out=options.out)) | meta["options"]
        now = _plain(options)
        changed = [n for n in now if n not in _FREE and now[n] != before[n]]
        # More steps or another learning rate are allowed; another model or other data are an error.
        fixed = [n for n in changed if n not in _ADJUSTABLE]
        if fixed:
            raise ValueError(
                "--resume: the run was started with other options: "
                + ", ".join(f"{n} {before[n]!r}, now {now[n]!r}" for n in fixed)
            )
        begun = before.get("model")
        if options.model is not None and (begun is None or Path(begun).resolve() != options.model.resolve()):
            raise ValueError(
                f"--resume: the run began with {begun or 'a fresh model'}, not with {options.model}; the "
                f"checkpoint holds its model; omit --model"
            )
        if options.steps < meta["step"]:
            raise ValueError(f"--steps {options.steps}: the run has already made {meta['step']} steps")


_ADJUSTABLE = ("steps", "lr", "own_lr", "min_lr", "clip", "weight_decay", "write_price", "warmup")


def model_config(options: TrainOptions, vocab_size: int) -> ModelConfig:
    """The config that the options describe, for a vocabulary; when resuming, that of the newest
    checkpoint."""
    changes = options.sizes()
    if options.resume:
        newest = checkpoints(options.out)[-1]
        config = read_checkpoint_config(newest, options.trust_remote_code)
        if config.vocab_size != vocab_size:
            raise ValueError(
                f"{newest} has a vocabulary of {config.vocab_size}, the tokenizer's is {vocab_size}; "
                f"give the tokenizer that the run was started with"
            )
        return config
    if options.model is None:
        config = preset(options.preset, vocab_size=vocab_size)
        return override(config, **changes, **composed(config, options.rule, options.trust_remote_code))
    changes |= options.rule
    config = read_config(options.model, trust_remote_code=options.trust_remote_code)
    if changes or config.vocab_size != vocab_size:
        raise ValueError(
            f"--model {options.model} has its sizes already (vocabulary {config.vocab_size}, the tokenizer's "
            f"is {vocab_size}); leave out {', '.join(changes) or 'the tokenizer or give the fitting one'}"
        )
    return override(config)


def _check_memory(options: TrainOptions, config: ModelConfig) -> None:
    """Refuse a step that does not fit into memory: the system would kill the process silently."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # unknown on this system
        return
    # The least that the backward pass needs per token: each layer's input and inner activations, in
    # 2 or 4 bytes.
    per_layer = (config.hidden_size + config.inner()) * (2 if options.bf16 else 4)
    least = options.batch_size * options.seq_len * per_layer * config.num_hidden_layers
    if least > there:
        raise ValueError(
            f"--seq-len {options.seq_len:,} and --batch-size {options.batch_size:,}: a step needs at least "
            f"{size_text(least)} of memory, and this machine has {size_text(there)}; use fewer tokens per step"
        )


def _task(options: TrainOptions, config: ModelConfig, tokenizer: Tokenizer) -> Task:
    if options.needle:
        return NeedleTraining(
            tokens_per_step=options.batch_size * options.seq_len,
            seed=options.seed,
            price_from=options.write_price_from,
        )
    # A run started by an older version keeps its alignment.
    begun = read_meta(checkpoints(options.out)[-1])["task"] if options.resume else {}
    sizes = {
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "align": begun.get("align", config.stride()),
        "seed": options.seed,
        "micro_batches": options.accumulate,
        "carry": options.carry,
    }
    if not options.text:
        tokens = tokenizer.encode(load_novel().train)
        return TextTask(tokens, bytes_per_token=len(load_novel().train) / len(tokens), **sizes)
    file = prepare(options.text, tokenizer, options.cache or options.out / "tokens")
    return TextTask(file, bytes_per_token=file.num_bytes / file.num_tokens, **sizes)


def _begin(options: TrainOptions, config: ModelConfig, task: Task) -> Run:
    fields = {f.name for f in dataclasses.fields(Settings)}
    settings = Settings(**{n: getattr(options, n) for n in fields})
    if options.resume:
        return Run.load(checkpoints(options.out)[-1], task, settings, options.trust_remote_code)
    torch.manual_seed(options.seed)
    model = (
        LM(config)
        if options.model is None
        else load_model(options.model, trust_remote_code=options.trust_remote_code)
    )
    return Run(model, task, settings)


class Metrics:
    """One JSON object per step, appended; a resumed run first removes lines after its checkpoint.

    missing: number of earlier steps that the file lacks.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) < step]
        self.missing = step - len({_step(line) for line in kept})
        # A symbolic link of this name is replaced, not followed: nothing outside the run's folder
        # is written.
        write_atomically(path, "".join(line + "\n" for line in kept).encode(), follow=False)
        self.path = path
        # Unbuffered, so that each line is written at once and closing cannot fail.
        self.file = path.open("ab", buffering=0)

    def add(self, row: dict[str, float]) -> None:
        """Write a step's metrics."""
        with naming(self.path):
            write_whole(self.file.fileno(), (json.dumps({**row, "time": time.time()}) + "\n").encode())

    def sync(self) -> None:
        """Flush to disk, so that a checkpoint never has more steps than the file."""
        with naming(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # a line truncated by a crash
        return math.inf


WINDOW = 50
"""Number of steps over which displayed metrics are averaged."""


class Means:
    """Means of the metrics over the last `WINDOW` steps, or over all if there are fewer."""

    def __init__(self) -> None:
        self.rows: deque[dict[str, float]] = deque(maxlen=WINDOW)

    def add(self, row: dict[str, float]) -> None:
        """Add a step's metrics."""
        self.rows.append(row)

    def of(self, name: str) -> float:
        """The mean of a metric that every step has."""
        return sum(row[name] for row in self.rows) / len(self.rows)


@contextmanager
def progress(console: Console, steps: int, run: Run) -> Iterator[Callable[[dict[str, float]], None]]:
    """A progress bar with loss, bits per byte, tokens/s and time left; plain lines without a
    terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    means = Means()
    tokens = run.tokens

    def show(row: dict[str, float]) -> None:
        nonlocal tokens
        means.add(row | {"read": row["tokens"] - tokens})
        tokens = row["tokens"]
        said = f"loss {means.of('loss'):.3f}  {means.of('bits_per_byte'):.3f} bits/byte  "
        said += f"{means.of('read') / max(means.of('seconds'), 1e-9):,.0f} tokens/s"
        if "accuracy" in row:
            said += f"  accuracy {means.of('accuracy'):.2f} at {row['length']:.0f}"
        bar.update(task, completed=row["step"] + 1, said=said)
        every = max(1, steps // 20)
        if not console.is_terminal and ((row["step"] + 1) % every == 0 or row["step"] + 1 == steps):
            console.print(f"step {row['step'] + 1:.0f}/{steps}  {said}")

    console.print(f"The values shown are means over the last {WINDOW} steps.")
    with bar:
        task = bar.add_task("training", total=steps, completed=run.step, said="")
        yield show
