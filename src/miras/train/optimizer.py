"""AdamW with two groups, and a learning rate with warm-up and cosine decay."""

import math

import torch
from torch import nn

from miras.nn.attention import AttentionReader
from miras.nn.gates import Precise
from miras.nn.mixer import Projection


def parameter_groups(
    model: nn.Module, lr: float, own_lr: float, weight_decay: float
) -> list[dict[str, object]]:
    """Two groups: matrices, with weight decay; gates, norms, convolutions, persistent tokens and
    initial memories, without.

    The second group has the learning rate lr * own_lr. Each parameter is in one group, in the
    model's order.
    """
    own: set[int] = set()
    for module in model.modules():
        if isinstance(module, Precise | nn.RMSNorm | nn.Embedding):
            own |= {id(p) for p in module.parameters()}
        elif isinstance(module, Projection):
            own.add(id(module.conv))
        elif isinstance(module, AttentionReader):
            own.add(id(module.persistent))
    parameters = list(model.parameters())
    return [
        {
            "params": [p for p in parameters if id(p) not in own],
            "peak": lr,
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "params": [p for p in parameters if id(p) in own],
            "peak": lr * own_lr,
            "lr": lr * own_lr,
            "weight_decay": 0.0,
        },
    ]


def schedule(step: int, steps: int, warmup: int, lowest: float) -> float:
    """The fraction of the peak learning rate at a step: linear to 1 over `warmup`, then a cosine to
    `lowest`."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    done = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    return rise * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * done)))


def set_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group to this fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
