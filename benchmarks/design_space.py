"""The MIRAS design space measured: every attentional bias with every retention gate, on one deep memory and one task.

Each cell is a small model of two memory layers (MLP memory, plain gradient descent), trained on associative recall
(4 pairs, 20 tokens, 32 values: 0.03 is chance, 0.25 is any value of the context) with the same number of steps at
three learning rates. One seed: differences of a few points say nothing. A run takes 20 seconds where the weights
are the accumulator (Keep, Decay), about a minute where they are mapped at every token. FDivergence is left out: it
bisects at every token, hours for a run; Simplex is its case of KL.

    python benchmarks/design_space.py                                    # all cells: about two CPU-hours
    python benchmarks/design_space.py --bias L2 Huber --retention Decay  # some of them
    python benchmarks/design_space.py --no-loops                         # without retentions that run token by token
    python benchmarks/design_space.py --only-table --markdown table.md   # what is there, as a table

Resumable: a finished run is one line of --runs and is not run again at the same settings; those that are known come
with the repository. Processes that are given different cells may share the file. A combination without meaning is
refused, a run that meets a number which is none has diverged: both are results. Other errors are shown, not kept.
"""

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.algorithm import GradientDescent
from miras.core.bias import L1, L2, Bias, Dot, Huber, LInf, Lp, Robust
from miras.core.memory import MLP
from miras.core.retention import (
    Decay,
    ElasticNet,
    Keep,
    LqNorm,
    ProximalElasticNet,
    Retention,
    Sigmoid,
    Simplex,
)
from miras.core.rule import Rule
from miras.data.batches import Batch
from miras.data.recall import IGNORE, RecallTask
from miras.nn.config import ModelConfig
from miras.nn.gates import Gate
from miras.nn.lm import LM, LMState
from miras.nn.memory import MemoryConfig
from miras.train.loop import NonFiniteError, Run
from miras.train.options import Settings

BIASES: dict[str, Bias] = {
    "Dot": Dot(),
    "L2": L2(),
    "L1": L1(),
    "Lp(3)": Lp(3.0, clip=1.0),
    "LInf": LInf(),
    "Huber": Huber(),
    "Robust": Robust(),
}
RETENTIONS: dict[str, Retention] = {
    "Keep": Keep(),
    "Decay": Decay(),
    "ElasticNet": ElasticNet(gamma=0.01),
    "LqNorm(4)": LqNorm(4.0),
    "Simplex": Simplex(),
    "Sigmoid": Sigmoid(),
    "ProximalElasticNet": ProximalElasticNet(gamma=1e-4),
}
GATES = {
    "lr": Gate(bias=-2.0),  # 0.12 at first: larger steps learn the task later
    "forget": Gate(bias=-5.0),
    "delta": Gate(link="softplus", bias=0.5413),  # 1 at first
    "radius": Gate(link="softplus", bias=-2.0),  # 0.13 at first
}
TASK = RecallTask(vocab_size=64, length=20, pairs=4)
TRAIN_SEED, TEST_SEED, TEST_SIZE = 0, 1, 256


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination at one learning rate, and how it is trained."""

    bias: str
    retention: str
    lr: float
    seed: int
    steps: int
    batch_size: int
    chunk_size: int

    def rule(self) -> Rule:
        """Raises ValueError for a combination without meaning."""
        return Rule(
            memory=MLP(depth=2, expansion=2),
            bias=BIASES[self.bias],
            retention=RETENTIONS[self.retention],
            algorithm=GradientDescent(step_bound=1.0),
            chunk_size=self.chunk_size,
        )

    def config(self) -> ModelConfig:
        rule = self.rule()
        return ModelConfig(
            vocab_size=TASK.vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=1,
            pattern=(MemoryConfig(rule=rule, gates={name: GATES[name] for name in rule.gates()}),),
        )

    def identity(self) -> dict[str, Any]:
        """All that the result depends on, for JSON: runs with an equal one are the same run."""
        config = self.config().to_dict()
        return {
            **dataclasses.asdict(self),
            "config": {n: v if isinstance(v, (int, float, str)) else repr(v) for n, v in config.items()},
            "task": repr(TASK),
        }


class RecallTraining:
    """Batches of associative recall by step, as `Run` wants them."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.micro_batches = batch_size, 1
        self.states: list[LMState | None] = [None]

    def batch(self, step: int, micro: int) -> Batch:
        tokens, labels = TASK.batch(TRAIN_SEED, step * self.batch_size, self.batch_size)
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
        return {}

    def bits_per_byte(self, nats: float) -> float:
        return nats / math.log(2)

    def asks_price(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "recall", "batch_size": self.batch_size}

    def restore(self, values: dict[str, Any]) -> None:
        if values != self.to_dict():  # batches are a function of the step alone: nothing else to restore
            raise ValueError(f"the run was trained on {values}, this is {self.to_dict()}")


def train(cell: Cell) -> dict[str, Any]:
    """Train and test one model: its accuracy and loss, or the step at which it diverged; and CPU seconds."""
    torch.manual_seed(cell.seed)
    settings = Settings(steps=cell.steps, lr=cell.lr, warmup=20)
    began = time.process_time()
    run = Run(LM(cell.config()), RecallTraining(cell.batch_size), settings)
    found: dict[str, Any] = {"accuracy": None, "loss": None, "diverged": None}
    try:
        for _ in run.until(cell.steps):
            pass
        accuracy, loss = test(run.model)
        if math.isfinite(loss):
            found |= {"accuracy": accuracy, "loss": loss}
        else:
            found["diverged"] = f"step {cell.steps}: the test loss is {loss}"
    except NonFiniteError as error:
        found["diverged"] = str(error)
    return found | {"seconds": round(time.process_time() - began, 2)}


@torch.no_grad()
def test(model: LM) -> tuple[float, float]:
    """Share of the values asked for that are answered, and mean nats of each, on examples never trained on."""
    tokens, labels = (torch.from_numpy(x) for x in TASK.batch(TEST_SEED, 0, TEST_SIZE))
    asked = labels != IGNORE
    logits = model(tokens)[0][asked]
    right = (logits.argmax(-1) == labels[asked]).double().mean()
    return float(right), float(F.cross_entropy(logits, labels[asked]))


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


def table(biases: Sequence[str], retentions: Sequence[str], cells: dict[Cell, dict[str, Any]]) -> str:
    """Markdown: biases down, retentions across, the best accuracy of the learning rates and which it was."""
    rows = [["", *retentions], ["---", *["---:"] * len(retentions)]]
    for bias in biases:
        row = [bias]
        for retention in retentions:
            found = {c.lr: r for c, r in cells.items() if (c.bias, c.retention) == (bias, retention)}
            row.append(_shown(found))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(found: dict[float, dict[str, Any]]) -> str:
    """One cell: its runs by learning rate, each with an accuracy or else "refused", "diverged" or "error"."""
    ran = {lr: r["accuracy"] for lr, r in found.items() if r.get("accuracy") is not None}
    others = [
        kind
        for kind in ("refused", "diverged", "error")
        for row in found.values()
        if row.get("accuracy") is None and row.get(kind)
    ]
    if not ran:
        return others[0] if others else "-"
    best = max(ran, key=lambda lr: ran[lr])
    counts = [f"{others.count(kind)} {kind}" for kind in dict.fromkeys(others)]
    return "; ".join([f"{ran[best]:.3f} ({best:g})", *counts])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bias", nargs="*", choices=list(BIASES), default=list(BIASES), metavar="NAME")
    parser.add_argument(
        "--retention", nargs="*", choices=list(RETENTIONS), default=list(RETENTIONS), metavar="NAME"
    )
    parser.add_argument(
        "--no-loops", action="store_true", help="leave out retentions that run token by token"
    )
    parser.add_argument("--lr", type=float, nargs="*", default=[5e-3, 1e-2, 2e-2])
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--chunk-size", type=int, default=8, help="the pairs fill one chunk, the questions meet what it left"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("benchmarks/results/design_space.jsonl"),
        help="where finished runs are kept",
    )
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    retentions = [n for n in options.retention if RETENTIONS[n].linear or not options.no_loops]
    cells: dict[Cell, dict[str, Any]] = {}
    for retention in retentions:
        for bias in options.bias:
            for lr in options.lr:
                cell = Cell(
                    bias, retention, lr, options.seed, options.steps, options.batch_size, options.chunk_size
                )
                cells[cell] = visit(cell, options.runs, options.only_table)
    text = table(options.bias, retentions, cells)
    print(text)
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text + "\n")


def visit(cell: Cell, file: Path, only_look: bool) -> dict[str, Any]:
    """The result of a cell, from the file if it is there; else trained and kept, unless `only_look`."""
    name = f"{cell.bias} x {cell.retention}, {cell.lr:g}"
    try:
        try:
            cell.rule()
        except ValueError as error:
            print(f"{name}: refused, {error}", flush=True)
            return {"refused": str(error)}
        identity = cell.identity()
        for row in finished(file):  # read again each time: others may be at it
            if row["run"] == identity:
                return row
        if only_look:
            return {}
        row = train(cell)
    except Exception as error:  # a cell that does not run yet must not stop the others
        print(f"{name}: error, {type(error).__name__}: {error}", flush=True)
        return {"error": f"{type(error).__name__}: {error}"}
    append(file, {"run": identity, **row})
    result = row["diverged"] or f"accuracy {row['accuracy']:.3f}, loss {row['loss']:.3f}"
    print(f"{name}: {result}, {row['seconds']:.0f} s", flush=True)
    return row


if __name__ == "__main__":
    main()
