"""The training loop: batch, loss, gradient, step, with carried states."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.nn.lm import LM, LMState
from miras.train.checkpoint import load_checkpoint, restore, save_checkpoint
from miras.train.diagnose import first_bad_gradient, first_non_finite
from miras.train.optimizer import parameter_groups, schedule, set_lr
from miras.train.options import Settings
from miras.train.price import openness
from miras.train.tasks import Task, as_tensors


class NonFiniteError(RuntimeError):
    """Training produced a non-finite value; the message names where."""


class Run:
    """A model in training: what changes from step to step, and how to save and restore all of
    it."""

    def __init__(self, model: LM, task: Task, settings: Settings) -> None:
        self.model, self.task, self.settings = model, task, settings
        groups = parameter_groups(model, settings.lr, settings.own_lr, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2))
        self.step = 0
        self.tokens = 0

    def advance(self) -> dict[str, float]:
        """One optimizer step; returns its metrics. Raises NonFiniteError before the model is
        changed."""
        began = time.perf_counter()
        task, settings = self.task, self.settings
        self.optimizer.zero_grad(set_to_none=True)
        set_lr(self.optimizer, schedule(self.step, settings.steps, settings.warmup, settings.min_lr))
        batches = [task.batch(self.step, micro) for micro in range(task.micro_batches)]
        weight = max(1.0, float(sum(batch.weight.sum() for batch in batches)))
        nats, open_share, seen = 0.0, 0.0, 0
        predicted: Tensor | None = None
        for micro, batch in enumerate(batches):
            data = as_tensors(batch)
            loss, opened, predicted, after = self._forward(data, micro)
            task.states[micro] = after.detach()
            objective = loss / weight
            if settings.write_price and task.asks_price():
                objective = objective + settings.write_price * opened / task.micro_batches
            objective.backward()
            nats += loss.item() / weight
            open_share += opened.item() / task.micro_batches
            seen += int(data["valid"].sum())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"step {self.step}: the gradient is not finite, first in {first_bad_gradient(self.model)}"
            )
        self.optimizer.step()
        metrics = {"step": self.step, "loss": nats, "bits_per_byte": task.bits_per_byte(nats)}
        if predicted is not None:
            metrics |= task.finished(self.step, batches[-1], predicted)
        self.step += 1
        self.tokens += seen
        metrics |= {
            "tokens": self.tokens,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm),
            "open": open_share,
            "seconds": time.perf_counter() - began,
        }
        return metrics

    def check(self) -> None:
        """Raise NonFiniteError if the next step's loss is not finite."""
        with torch.no_grad():
            for micro in range(self.task.micro_batches):
                self._forward(as_tensors(self.task.batch(self.step, micro)), micro)

    def _forward(self, data: dict[str, Tensor], micro: int) -> tuple[Tensor, Tensor, Tensor, LMState]:
        """For a micro-batch: the summed weighted loss in nats, openness, predicted ids (B, T), the
        state afterwards."""
        state = self.task.states[micro]
        masks = _needed(data, state is None)
        device = data["tokens"].device.type
        with openness(self.model) as gates, torch.autocast(device, torch.bfloat16, self.settings.bf16):
            x, after = self.model.hidden(data["tokens"], state, **masks)
            at = data["weight"] > 0
            logits = self.model.lm_head(x[at])
        loss = F.cross_entropy(logits.float(), data["targets"][at], reduction="none") @ data["weight"][at]
        if not torch.isfinite(loss):
            where = first_non_finite(self.model, data["tokens"], state, **masks)
            raise NonFiniteError(f"step {self.step}: the loss is {loss.item()}; first not finite: {where}")
        predicted = torch.zeros_like(data["targets"])
        predicted[at] = logits.detach().argmax(-1)
        return loss, gates.mean(), predicted, after

    def save(self, folder: Path, options: dict[str, Any], extra: dict[str, bytes], keep: int) -> Path:
        """Write a checkpoint of everything; see `miras.train.checkpoint`."""
        meta = {"step": self.step, "tokens": self.tokens, "task": self.task.to_dict(), "options": options}
        return save_checkpoint(folder, self.model, self.optimizer, self.task.states, meta, extra, keep)

    @staticmethod
    def load(path: Path, task: Task, settings: Settings, trust_remote_code: bool = False) -> "Run":
        """Load the run in a checkpoint, to continue exactly; `trust_remote_code` as in
        `load_model`."""
        model, tensors, meta = load_checkpoint(path, trust_remote_code)
        run = Run(model, task, settings)
        task.restore(meta["task"])
        task.states = restore(model, run.optimizer, tensors, meta)
        run.step, run.tokens = meta["step"], meta["tokens"]
        return run

    def until(self, steps: int) -> Iterator[dict[str, float]]:
        """The metrics of each step up to `steps`."""
        while self.step < steps:
            yield self.advance()


def _needed(data: dict[str, Tensor], fresh: bool) -> dict[str, Tensor]:
    """The masks that have an effect: without masks the model is faster.

    A reset of the first token has no effect on a `fresh` state.
    """
    valid, reset = data["valid"], data["reset"]
    masks = {} if bool(valid.all()) else {"valid": valid}
    return masks | ({"reset": reset} if bool(reset[:, int(fresh) :].any()) else {})
