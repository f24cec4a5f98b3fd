"""Data-dependent gates: from a layer's input to the natural values that a rule reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.core.rule import Rule


def hard(x: Tensor) -> Tensor:
    """A sigmoid that reaches both ends, clamp(1.1 sigmoid(x) - 0.05, 0, 1): exactly 0 below -3.05, 1 above 3.05."""
    return (1.1 * torch.sigmoid(x) - 0.05).clamp(0, 1)


LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "hard": hard,
}


@dataclass(frozen=True)
class Gate:
    """How one gate is made: scale * link(x W + bias), one value per token and head.

    link: "sigmoid", "softplus" or "hard" (exactly 0 and 1 are reached); per_weight: each weight of the memory
    has its own (Titans, NeurIPS version, appendices B.3 and F). Raises ValueError for an unknown link or a
    scale that is not positive.
    """

    link: str = "sigmoid"
    scale: float = 1.0
    bias: float = 0.0
    per_weight: bool = False

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise ValueError(f"Gate: unknown link {self.link!r}; choose one of {', '.join(LINKS)}")
        if not self.scale > 0:
            raise ValueError(f"Gate: scale must be positive, got {self.scale}")


class Precise(nn.Module):
    """A module whose parameters stay in fp32 when the model around it is cast to a shorter type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Precise":
        def keep(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if y.dtype in (torch.float16, torch.bfloat16) else y

        return super()._apply(keep, recurse)


class Gates(Precise):
    """All gates that a rule reads, from x (B, T, hidden) to {name or name.weight: (B, H, T)}, in fp32.

    `lr` is multiplied by 1 - (the largest momentum), so that momentum does not add up to longer steps: a step of
    lr decays over 1 / (1 - momentum) tokens.
    """

    def __init__(self, hidden_size: int, num_heads: int, rule: Rule, gates: Mapping[str, Gate]) -> None:
        super().__init__()
        missing = [name for name in rule.gates() if name not in gates]
        if missing:
            raise ValueError(f"Gates: the rule reads {', '.join(missing)}, which no Gate(...) is given for")
        self.num_heads = num_heads
        self.outputs: list[tuple[str, Gate]] = []
        for name in rule.gates():
            tails = [f".{n}" for n in rule.memory.shapes(1, 1)] if gates[name].per_weight else [""]
            self.outputs += [(name + tail, gates[name]) for tail in tails]
        self.lr_factor = 1 - gates["momentum"].scale if rule.algorithm.momentum else 1.0
        if self.lr_factor <= 0:
            raise ValueError(
                f"Gates: momentum must stay below 1 to be stable, so its scale must; got {gates['momentum'].scale}"
            )
        largest = gates["lr"].scale * self.lr_factor * rule.algorithm.step_bound
        if gates["lr"].link != "softplus" and largest > 1 + 1e-6:
            raise ValueError(
                f"Gates: step_bound times the largest lr must be at most 1, got {rule.algorithm.step_bound} * "
                f"{gates['lr'].scale * self.lr_factor:g}; lower the scale of the lr gate, or give the step_bound "
                f"that fits the largest momentum, 1 / (1 - m) = {1 / self.lr_factor:g}"
            )
        if rule.algorithm.momentum and 0 < rule.algorithm.step_bound < 1 / self.lr_factor - 1e-6:
            raise ValueError(
                f"Gates: a step_bound of {rule.algorithm.step_bound} does not count momentum of up to "
                f"{gates['momentum'].scale}; give 1 / (1 - m) = {1 / self.lr_factor:g} or more, or 0 for none"
            )
        self.proj = nn.Linear(hidden_size, num_heads * len(self.outputs))

    def reset_parameters(self, std: float) -> None:
        """Small weights, and the biases that the gates name."""
        nn.init.normal_(self.proj.weight, std=std)
        with torch.no_grad():
            for i, (_, gate) in enumerate(self.outputs):
                self.proj.bias[i * self.num_heads : (i + 1) * self.num_heads] = gate.bias

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            raw = self.proj(x.to(self.proj.weight.dtype)).transpose(1, 2)  # (B, gates * H, T)
        values: dict[str, Tensor] = {}
        for i, (name, gate) in enumerate(self.outputs):
            value = gate.scale * LINKS[gate.link](raw[:, i * self.num_heads : (i + 1) * self.num_heads])
            values[name] = value * self.lr_factor if name.split(".")[0] == "lr" else value
        return values
