"""First values chosen by measurement: one small training for each cell of a grid, one JSON line for each.

    python benchmarks/tuning.py --grid first-values --text NOVELS     # every cell that is not yet there
    python benchmarks/tuning.py --preset yaad --set '{"retention": {"towards": "initial"}}' --text NOVELS
    python benchmarks/tuning.py --grid recall --text NOVELS
    python benchmarks/tuning.py --table                                # what is there, as markdown

A cell is a preset, changes of its config, a task, and how it is trained. Tasks:

novels  next-byte prediction: 4 lanes of 256 bytes a step, states carried, gradients clipped at 1. NOVELS is a folder
        or archive of books, of which every eleventh is held out (the 66 English novels of computationalstylistics'
        corpus "100 English Novels" leave 60 and 6); without --text, the embedded novel and its last chapters. The
        score is bits per byte of the held-out books, read side by side from their beginnings, states carried.
mqar    multi-query associative recall (vocabulary 256), 1,024 tokens a step, 2 to 32 pairs in 8 tokens each; more
        pairs come when half are answered. The score is the step after which 99 % of held-out questions are answered,
        of 8 pairs in 64 tokens and of 16 in 128; a run ends when both are.

Resumable: a finished cell is one line of --runs and is not run again; a cell is known by its model's config, not by
its name, so that a preset whose defaults have changed is another cell. One thread, about 1,024 tokens a step.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miras.core.observe import observe
from miras.data.batches import Batch
from miras.data.needle import Curriculum
from miras.data.novel import load_novel
from miras.data.recall import IGNORE, RecallTask
from miras.data.text import read_documents
from miras.nn.config import AXES, ModelConfig
from miras.nn.lm import LM, LMState
from miras.nn.memory import TITANS_RULE, Features, MemoryConfig
from miras.nn.plain import fields
from miras.nn.reading import read_pieces
from miras.train.loop import NonFiniteError, Run
from miras.train.options import Settings
from miras.train.tasks import TextTask
from miras.zoo import match_size, preset

RUNS = Path("benchmarks/results/tuning.jsonl")

SIZES: dict[str, dict[str, Any]] = {
    "1M": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_heads": 4,
        "window_size": 64,
        "segment_size": 64,
        "num_persistent": 8,
    },
    "recall": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "segment_size": 64},
}
PARAMETERS = {"1M": 1_084_768}
"""What titans-lmm has; the width of the SwiGLU makes every model as large."""

WINDOWLESS = ("transformer",)
"""Presets that attend to everything at every size."""

HELD_OUT = 11
"""Every eleventh book is held out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One training. `change` is merged into the preset's config as it is written; see `changed`."""

    preset: str
    change: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    task: str = "novels"
    tokens: int = 300_000
    held_out: int = 16_384
    lr: float = 3e-3
    own_lr: float = 1.0
    seed: int = 0
    size: str = "1M"

    def config(self) -> ModelConfig:
        config = ModelConfig.from_dict(self.written())
        return match_size(config, PARAMETERS[self.size]) if self.size in PARAMETERS else config

    def written(self) -> dict[str, Any]:
        """The config as format 1 writes it, before its size is matched."""
        sizes = dict(SIZES[self.size])
        if self.preset in WINDOWLESS:
            sizes.pop("window_size", None)
        return changed(format_1(preset(self.preset)) | sizes, self.change)

    def identity(self, text: str) -> dict[str, Any]:
        """All that the result depends on; the config in format 1, so that the runs of a file stay known."""
        names = ["task", "tokens", "lr", "own_lr", "seed"]
        names += ["held_out"] if self.task == "novels" else []
        written = self.written() | {"intermediate_size": self.config().intermediate_size}
        config = json.dumps(written, sort_keys=True)
        found = {"config": hashlib.sha256(config.encode()).hexdigest()[:12]}
        return (
            found | {n: getattr(self, n) for n in names} | ({"text": text} if self.task == "novels" else {})
        )

    def command(self) -> str:
        """The options that train this cell alone."""
        words = ["--preset", self.preset]
        words += ["--set", json.dumps(self.change)] if self.change else []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name not in ("preset", "change") and value != f.default:
                words += [f"--{f.name.replace('_', '-')}", str(value)]
        return shlex.join(words)


FIRST = {
    "MLP": {"depth", "expansion", "residual", "norm"},
    "Decay": {"decayed"},
    "GradientDescent": {"momentum", "step_bound"},
    "Gate": {"link", "scale", "bias", "per_weight"},
}
"""Fields that format 1 writes whatever they hold, by class."""


def format_1(config: ModelConfig) -> dict[str, Any]:
    """A preset's config as format 1 has it: the settings of all mixers side by side."""
    memory = next(iter(config.memories()), MemoryConfig(rule=TITANS_RULE))
    other = {"window_size": None, "num_persistent": 0, "segment_size": 512}
    for part in (part for each in config.pattern for part in each.walk()):
        other |= {n: value for n, value in vars(part).items() if n in other}
    sizes = fields(config)
    return {
        "format_version": 1,
        **{n: value for n, value in sizes.items() if n not in ("pattern", "mlp")},
        "pattern": [each.name for each in config.pattern],
        "rule": {axis: first(getattr(memory.rule, axis)) for axis in AXES}
        | {"chunk_size": memory.rule.chunk_size},
        "gates": {n: first(gate) for n, gate in memory.gates.items()},
        "conv_size": memory.conv_size,
        "initial_scale": memory.initial_scale,
        **{n: value for n, value in other.items() if (n, value) != ("segment_size", 512)},
        **({"features": first(memory.features)} if memory.features != Features() else {}),
    }


def first(part: Any) -> dict[str, Any]:
    """The fields of a choice that format 1 writes: those above, and what is no default."""
    kind = type(part).__name__
    kept = {
        f.name: getattr(part, f.name)
        for f in dataclasses.fields(part)
        if f.init and (f.name in FIRST.get(kind, ()) or getattr(part, f.name) != f.default)
    }
    return kept if kind in ("Gate", "Features") else {"name": kind, **kept}


def changed(written: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A written config with changes merged into it.

    memory, bias, retention, algorithm and chunk_size stand beside the other fields; an axis or a gate keeps what is
    not named, unless the axis gets another "name".
    """
    for key, value in change.items():
        if key in AXES:
            old = written["rule"][key]
            written["rule"][key] = value if value.get("name", old["name"]) != old["name"] else old | value
        elif key == "chunk_size":
            written["rule"][key] = value
        elif key == "gates":
            for name, gate in value.items():
                written["gates"][name] = written["gates"].get(name, {}) | gate
        elif key == "features":
            written[key] = written.get(key, {}) | value
        else:
            written[key] = value
    return written


INITIAL = {"retention": {"towards": "initial"}}
ZERO = {"retention": {"towards": "zero"}}


def forgetting(bias: float) -> dict[str, Any]:
    return {"gates": {"forget": {"bias": bias}}}


def merged(*changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes together; the gates of all of them."""
    found: dict[str, Any] = {}
    for change in changes:
        for key, value in change.items():
            nested = isinstance(value, Mapping) and key != "memory"
            found[key] = merged(found.get(key, {}), value) if nested else value
    return found


def cells(name: str, *changes: Mapping[str, Any], **settings: Any) -> list[Cell]:
    return [Cell(preset=name, change=change, **settings) for change in changes]


OWN_LR = {"swa": 1.0, "transformer": 1.0}
"""Of the finalists, by what 102,400 tokens said; 3 for all that have a memory."""

GRIDS: dict[str, list[Cell]] = {
    "first-values": [*cells("gated-deltanet", {}), *cells("swa", {}), *cells("titans-lmm", {})],
    "finalists": [
        Cell(preset=name, seed=seed, tokens=2_000_000, held_out=65_536, own_lr=OWN_LR.get(name, 3.0))
        for names, seeds in (
            (("titans-lmm", "titans-mag", "gated-deltanet", "swa"), (0, 1, 2)),
            (("titans-mac", "yaad", "moneta", "memora", "deltanet", "mamba2", "transformer"), (0,)),
        )
        for seed in seeds
        for name in names
    ],
    "reading": [
        Cell(preset=name, change={field: window}, own_lr=OWN_LR.get(name, 3.0), tokens=tokens)
        for window in (16, 64, 256)
        for name, field, tokens in (
            ("titans-mag", "window_size", 300_000),
            ("titans-mac", "segment_size", 300_000),
            ("swa", "window_size", 300_000),
            ("swa", "window_size", 1_200_000),  # about the time of titans-mag
        )
    ],
    "recall": [
        Cell(preset=name, task="mqar", size="recall", tokens=2_000_000)
        for name in ("deltanet", "gated-deltanet", "titans-linear", "titans-lmm")
    ],
}


class Recall:
    """Associative recall with more pairs as it is answered, as `Run` wants it."""

    TOKENS = 1024

    def __init__(self, seed: int) -> None:
        self.seed, self.micro_batches = seed, 1
        self.states: list[LMState | None] = [None]
        self.curriculum = Curriculum(lengths=(16, 32, 64, 128, 256), threshold=0.5)

    @staticmethod
    def task(length: int) -> RecallTask:
        return RecallTask(vocab_size=256, length=length, pairs=length // 8)

    def batch(self, step: int, micro: int) -> Batch:
        length = self.curriculum.length(self.seed, step)
        rows = self.TOKENS // length
        tokens, labels = self.task(length).batch(self.seed, step * rows, rows)
        asked = labels != IGNORE
        return Batch(
            tokens=tokens,
            targets=np.where(asked, labels, 0),
            valid=np.ones_like(asked),
            reset=np.zeros_like(asked),  # every batch begins with new streams
            weight=asked.astype(np.float32),
        )

    def finished(self, step: int, batch: Batch, predicted: Tensor) -> dict[str, float]:
        self.states = [None]
        asked = batch.weight > 0
        accuracy = float((predicted.numpy() == batch.targets)[asked].mean())
        self.curriculum = self.curriculum.update(accuracy, batch.tokens.shape[1])
        return {"accuracy": accuracy}

    def bits_per_byte(self, nats: float) -> float:
        return nats / math.log(2)

    def asks_price(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "recall", "seed": self.seed, "curriculum": self.curriculum.to_dict()}

    def restore(self, values: dict[str, Any]) -> None:
        self.curriculum = Curriculum.from_dict(values["curriculum"])


class Books:
    """Text to train on, with where each book ends, and the beginnings of the books that are held out."""

    def __init__(self, source: str | None) -> None:
        self.name = "embedded novel" if source is None else Path(source).name
        if source is None:
            novel = load_novel()
            train, held_out = [novel.train], [novel.heldout]
        else:
            books = [document.data for document in read_documents(source)]
            held_out = books[HELD_OUT - 1 :: HELD_OUT]
            train = [book for i, book in enumerate(books) if i % HELD_OUT != HELD_OUT - 1]
            self.name = f"{self.name}, {len(train)} and {len(held_out)} books"
        if not held_out:
            raise SystemExit(f"--text must hold at least {HELD_OUT} books, so that one is held out")
        self.train = np.frombuffer(b"".join(train), np.uint8)
        self.offsets = np.cumsum([0, *map(len, train)])
        self.held_out = held_out

    def beginnings(self, length: int) -> NDArray[np.uint8]:
        """(books, length) of the held-out books; of a single one, as many parts of it as there are, up to 6."""
        if len(self.held_out) > 1:
            parts = [book[:length] for book in self.held_out]
        else:
            parts = [self.held_out[0][i * length : (i + 1) * length] for i in range(6)]
        return np.stack([np.frombuffer(part, np.uint8) for part in parts if len(part) == length])


def train(cell: Cell, books: Books) -> dict[str, Any]:
    """The result of a cell."""
    torch.manual_seed(cell.seed)
    model = LM(cell.config())
    stride = model.config.stride()
    if cell.task == "novels":
        task = TextTask(books.train, books.offsets, batch_size=4, seq_len=256, align=stride, seed=cell.seed)
    else:
        task = Recall(cell.seed)
    steps = max(1, cell.tokens // 1024)
    run = Run(model, task, Settings(steps=steps, lr=cell.lr, own_lr=cell.own_lr))
    found: dict[str, Any] = {"parameters": model.num_parameters(), "steps": steps, "failed": None}
    metrics: list[dict[str, float]] = []
    solved: dict[str, int | None] = {"8 in 64": None, "16 in 128": None}
    began = time.process_time()
    try:
        for row in run.until(steps):
            metrics.append(row)
            if cell.task == "mqar" and run.step % 25 == 0:
                for name, at in solved.items():
                    if at is None and recalled(model, int(name.split()[-1])) >= 0.99:
                        solved[name] = run.step
                if None not in solved.values():
                    break
    except NonFiniteError as error:
        found["failed"] = str(error)
    seconds = time.process_time() - began
    norms = [row["grad_norm"] for row in metrics[10:]] or [math.nan]
    found |= {
        "train_tokens_per_second": round(run.tokens / seconds),
        "train_bits": curve([row["bits_per_byte"] for row in metrics]),
        "grad_norm_median": statistics.median(norms),
        "grad_norm_largest": max(norms),
        "clipped": sum(norm > run.settings.clip for norm in norms) / len(norms),
    }
    if cell.task == "mqar":
        lengths = (64, 128, 256, 512)
        found |= {
            "solved": solved,
            "accuracy": {f"{n // 8} in {n}": recalled(model, n) for n in lengths},
        }
    elif found["failed"] is None:
        found |= read(model, books.beginnings(cell.held_out))
    return found | {"cpu_seconds": round(time.process_time() - began, 1)}


def curve(bits: list[float]) -> list[float]:
    """The mean of each of up to 20 equal parts."""
    return [round(float(np.mean(part)), 4) for part in np.array_split(bits, min(20, len(bits))) if len(part)]


@torch.no_grad()
def recalled(model: LM, length: int, rows: int = 64) -> float:
    """The share of the questions that is answered, on examples never trained on."""
    tokens, labels = (torch.from_numpy(x) for x in Recall.task(length).batch(1_000_003, 0, rows))
    asked = labels != IGNORE
    return float((model(tokens)[0].argmax(-1) == labels)[asked].double().mean())


@torch.no_grad()
def read(model: LM, tokens: NDArray[np.uint8]) -> dict[str, Any]:
    """Bits per byte of the books (books, T), by position, and the weights' size at the end of the first 2,048."""
    began = time.process_time()
    losses = np.concatenate([part.losses for part in read_pieces(model, tokens, piece=1024)], 1)
    seconds = time.process_time() - began
    bits = losses / math.log(2)
    edges = [1 << n for n in range(8, tokens.shape[1].bit_length())]
    with observe() as seen:
        model(torch.from_numpy(tokens[:, :2048].astype(np.int64)))
    weights = [seen[layer]["weight"] for layer in seen.layers()]
    found: dict[str, Any] = {
        "bits_per_byte": round(float(np.nanmean(bits)), 4),
        "by_book": [round(float(x), 4) for x in np.nanmean(bits, 1)],
        "up_to": {
            str(b): round(float(np.nanmean(bits[:, a:b])), 4)
            for a, b in zip([0, *edges], edges, strict=False)
        },
        "read_tokens_per_second": round(tokens.size / seconds),
    }
    if weights:
        size = torch.cat(weights, 1)
        found["weight"] = {
            "first": round(float(size[..., 0].mean()), 3),
            "smallest": round(float(size.min()), 3),
            "largest": round(float(size.max()), 3),
            "last": round(float(size[..., -1].mean()), 3),
        }
    return found


def finished(file: Path) -> list[dict[str, Any]]:
    """The runs of a file; a line that is cut off at its end, by a kill or a full disk, is none."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a line in one write, on disk before this returns; a cut line before it is closed first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row).encode() + b"\n"
    with open(file, "ab+") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            line = line if out.read(1) == b"\n" else b"\n" + line
        os.write(out.fileno(), line)
        os.fsync(out.fileno())


def commit() -> str:
    """The commit that is measured, with "+" where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../src"]).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("" if clean else "+")


def visit(cell: Cell, books: Books, file: Path) -> None:
    """Train a cell that the file does not hold, and keep its result."""
    try:
        identity = cell.identity(books.name)
        if any(row["run"] == identity for row in finished(file)):  # read again each time: others may be at it
            print(f"{cell.command()}: known", flush=True)
            return
        found = train(cell, books)
    except (ValueError, TypeError) as error:  # a cell that does not run must not stop the others
        print(f"{cell.command()}: {type(error).__name__}: {error}", flush=True)
        return
    about = {"preset": cell.preset, "change": dict(cell.change), "size": cell.size}
    about |= {"command": cell.command(), "commit": commit(), "torch": torch.__version__}
    append(file, {"run": identity, **about, **found})
    print(f"{cell.command()}: {shown(found)}", flush=True)


def shown(row: Mapping[str, Any]) -> str:
    """A result in a few words."""
    if row["failed"]:
        return row["failed"]
    score = f"{row['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in row else str(row["solved"])
    return f"{score}, gradient norm {row['grad_norm_median']:.3g}, {row['cpu_seconds']:.0f} s"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: a table for each task, its length and held-out length, in the order of the file."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        run = row["run"]
        groups.setdefault((run["task"], run["tokens"], run.get("held_out"), run.get("text")), []).append(row)
    return "\n\n".join(
        _group(f"{task}, {tokens:,} tokens" + (f"; {text}, read to {held:,}" if text else ""), found)
        for (task, tokens, held, text), found in groups.items()
    )


def _group(title: str, rows: list[dict[str, Any]]) -> str:
    recall = rows[0]["run"]["task"] == "mqar"
    scores = ["8 in 64", "16 in 128", "32 in 256"] if recall else ["bits per byte", "last half"]
    head = [
        "preset",
        "change",
        "lr",
        "own lr",
        "seed",
        *scores,
        "norm",
        "largest",
        r"\|W\|",
        "tokens/s",
        "size",
    ]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in rows:
        run = row["run"]
        if row["failed"]:
            score = ["failed"] * len(scores)
        elif recall:
            score = [
                f"step {at}" if at else f"{row['accuracy'][name]:.2f}"
                for name, at in ((n, row["solved"].get(n)) for n in scores)
            ]
        else:
            score = [f"{row['bits_per_byte']:.3f}", f"{list(row['up_to'].values())[-1]:.3f}"]
        weight = row.get("weight")
        lines.append(
            [
                row["preset"],
                _words(row["change"]),
                f"{run['lr']:g}",
                f"{run['own_lr']:g}",
                str(run["seed"]),
                *score,
                f"{row['grad_norm_median']:.2g}",
                f"{row['grad_norm_largest']:.2g}",
                f"{weight['smallest']:.3g} to {weight['largest']:.3g}" if weight else "",
                f"{row['train_tokens_per_second']:,}",
                f"{row['parameters']:,}",
            ]
        )
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _words(change: Mapping[str, Any], inside: str = "") -> str:
    """A change in short: forget.bias -3, retention.towards initial."""
    parts = []
    for name, value in change.items():
        where = f"{inside}.{name}" if inside else name
        plain = not isinstance(value, Mapping)
        parts.append(f"{where} {value}" if plain else _words(value, "" if name == "gates" else where))
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", nargs="*", choices=list(GRIDS), default=[])
    parser.add_argument(
        "--preset", nargs="*", default=[], help="cells of your own; with a grid, only these of it"
    )
    parser.add_argument(
        "--set", type=json.loads, action="append", metavar="JSON", help="a change of the config"
    )
    parser.add_argument("--task", choices=["novels", "mqar"], default="novels")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--held-out", type=int, default=16_384, help="bytes of each held-out book")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--own-lr", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=list(SIZES), help="default: 1M for novels, recall for mqar")
    parser.add_argument("--text", help="a folder or archive of books; the embedded novel without it")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where finished cells are kept")
    parser.add_argument("--table", action="store_true", help="print what is there and train nothing")
    options = parser.parse_args()
    if options.table:
        print(table(finished(options.runs)))
        return
    torch.set_num_threads(1)
    chosen = [cell for name in options.grid for cell in GRIDS[name]]
    if options.grid and options.preset:
        chosen = [cell for cell in chosen if cell.preset in options.preset]
    if not options.grid:
        chosen = [
            Cell(
                preset=name,
                change=change,
                task=options.task,
                tokens=options.tokens,
                held_out=options.held_out,
                lr=options.lr,
                own_lr=options.own_lr,
                seed=options.seed,
                size=options.size or ("recall" if options.task == "mqar" else "1M"),
            )
            for name in options.preset
            for change in options.set or [{}]
        ]
    books = Books(options.text)
    for cell in chosen:
        visit(cell, books, options.runs)


if __name__ == "__main__":
    main()
