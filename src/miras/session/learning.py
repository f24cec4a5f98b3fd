"""The slow loop: outer weights that learn from the stream that the memories read."""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from miras.core.observe import observe
from miras.core.state import Tree
from miras.nn.folder import weights
from miras.nn.lm import LM, LMState
from miras.train.optimizer import parameter_groups


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How the outer weights learn from the stream: AdamW, one step per `segment` tokens.

    lr: learning rate; segment: tokens per step, through which its gradient flows (the state before
    them is detached); replay: number of past steps' tokens kept in a reservoir, one of which is
    learned beside each new step; clip: largest norm of the gradient. Raises ValueError for invalid
    values.
    """

    lr: float = 1e-5
    segment: int = 512
    replay: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name, lowest in (("lr", 0), ("segment", 2), ("replay", 0), ("weight_decay", 0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= lowest):
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")


class Learner:
    """A copy of a model that learns step by step."""

    def __init__(self, model: LM, learning: Learning) -> None:
        self.model = copy.deepcopy(model).requires_grad_()
        self._clip = learning.clip
        groups = parameter_groups(self.model, learning.lr, 1.0, learning.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def step(self, segments: list[tuple[NDArray, LMState | None]]) -> None:
        """One step on sequences (T,) of at least 2 tokens, each after a state, None for a new
        stream.

        The loss is the mean over all tokens predicted within their own sequence. Raises ValueError
        if a value is not finite; the weights are then those of the previous step.
        """
        count = sum(len(ids) - 1 for ids, _ in segments)
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for ids, state in segments:
            loss = self._nats(ids, state) / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        if not (math.isfinite(total) and bool(torch.isfinite(norm))):
            raise ValueError(
                f"learning produced a non-finite value (loss {total}, gradient {float(norm)}); use a smaller "
                f"--lr, or feed without --learn"
            )
        self._optimizer.step()

    def _nats(self, ids: NDArray, state: LMState | None) -> Tensor:
        device = self.model.model.embed_tokens.weight.device
        tokens = torch.as_tensor(ids, dtype=torch.long, device=device)[None]
        with torch.enable_grad(), observe(False):
            logits, _ = self.model(tokens, state)
            return F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum")


def difference(model: LM, base: LM) -> Tree:
    """What was learned, {weight: the model's minus the base's}, at least in fp32; only weights that
    differ."""
    before = weights(base)
    found: Tree = {}
    for name, x in weights(model).items():
        wide = torch.promote_types(x.dtype, torch.float32)
        if not torch.equal(x, before[name]):
            found[name] = x.to(wide) - before[name].to(wide)
    return found


def learned(base: LM, delta: Tree) -> LM:
    """A base model plus what was learned; the base model itself if that is nothing."""
    if not delta:
        return base
    model = copy.deepcopy(base)
    held = weights(model)
    model.load_state_dict(
        held | {name: (held[name].to(d) + d).to(held[name]) for name, d in delta.items()},
        strict=not model.config.tie_word_embeddings,
    )
    return model
