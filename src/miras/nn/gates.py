"""Gates: from a layer's input to the values that a rule reads."""

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.core.rule import Rule, pair_gates
from miras.core.typed import Typed


def hard(x: Tensor) -> Tensor:
    """A sigmoid that reaches both ends, clamp(1.1 sigmoid(x) - 0.05, 0, 1): exactly 0 below -3.05,
    1 above 3.05."""
    return (1.1 * torch.sigmoid(x) - 0.05).clamp(0, 1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    # because the gradient of its softplus has other strides than it claims
    if torch.compiler.is_compiling():
        return torch.logaddexp(x, torch.zeros_like(x))
    return F.softplus(x)


def root_sigmoid(x: Tensor) -> Tensor:
    """1 - sigmoid(-x)^(1/16): GLA's forgetting, small unless x is large (GLA 4.4, its temperature
    16)."""
    return -torch.expm1(-softplus(x) / 16)


def capped_exp(x: Tensor) -> Tensor:
    """exp(15 tanh(x / 15)): mLSTM's input gate under the cap of xLSTM 7B, at most 3.3e6."""
    return (15 * torch.tanh(x / 15)).exp()


def decay(x: Tensor, log_rate: Tensor | float = 0.0) -> Tensor:
    """1 - exp(-rate softplus(x)): the forgetting of Mamba-2 and Gated DeltaNet, with a learned rate
    for each head."""
    rate = log_rate.exp() if isinstance(log_rate, Tensor) else math.exp(log_rate)
    return -torch.expm1(-rate * softplus(x))


LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": softplus,
    "hard": hard,
    "root_sigmoid": root_sigmoid,
    "exp": capped_exp,
    "exp2": torch.exp2,
    "decay": decay,
}
BOUNDED = ("sigmoid", "hard", "root_sigmoid", "decay")
"""Links whose largest value is 1."""


@dataclass(frozen=True)
class Gate(Typed):
    """How a gate is computed: scale * link(x W + b), with b = bias + step * h initially for head h.

    link: "sigmoid", "softplus", "hard" (exactly 0 and 1 are reached), "root_sigmoid" (GLA), "exp"
    (mLSTM, capped), "exp2" (2^x), "decay" (Mamba-2: with a learned rate per head, initially 1 to
    16). spread: each head's b is drawn between b and b + spread. per_weight: each weight of the
    memory has its own gate (Titans, NeurIPS version, appendices B.3 and F). channels: None for one
    value per token and head, or one value for each "input" or "output" channel of a weight (for a
    gate of the bias: each value channel); x W then has low rank, through `rank` numbers that the
    heads share (MIRAS 7.1), or is a full projection for rank 0. source: "token", computed from x;
    "constant", without x W, so that only b is learned: the input-independent control; "fixed", b is
    not learned either. follows: the gate whose x W + b this one uses instead of its own (Mamba-2:
    forget follows lr).

    Raises ValueError for an unknown choice, a scale that is not positive, and incompatible fields.
    """

    link: str = "sigmoid"
    scale: float = 1.0
    bias: float = 0.0
    per_weight: bool = False
    channels: Literal["input", "output"] | None = None
    rank: int = 32
    source: Literal["token", "constant", "fixed"] = "token"
    step: float = 0.0
    spread: float = 0.0
    follows: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("link", tuple(LINKS)),
            ("channels", (None, "input", "output")),
            ("source", ("token", "constant", "fixed")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"Gate: unknown {name} {value!r}; choose one of {', '.join(map(str, allowed))}"
                )
        if not self.scale > 0:
            raise ValueError(f"Gate: scale must be positive, got {self.scale}")
        if self.rank < 0:
            raise ValueError(f"Gate: rank must be at least 1, or 0 for a full projection, got {self.rank}")
        if self.spread < 0 or (self.spread and self.source == "fixed"):
            raise ValueError(
                f"Gate: spread draws first values to be learned: at least 0, and 0 for source='fixed'; got "
                f"{self.spread} with source={self.source!r}"
            )
        own = (self.bias, self.per_weight, self.channels, self.source, self.step, self.spread)
        if self.follows is not None and own != (0.0, False, None, "token", 0.0, 0.0):
            raise ValueError(
                f"Gate: one that follows {self.follows!r} has its source, bias and channels from there; give it only "
                f"link and scale"
            )

    def first(self, num_heads: int) -> list[float]:
        """The initial bias of every head, without `spread`."""
        return [self.bias + self.step * h for h in range(num_heads)]

    def largest(self, num_heads: int) -> float:
        """The largest value that it can have; inf if unbounded."""
        if self.source == "fixed":
            values = LINKS[self.link](torch.tensor(self.first(num_heads), dtype=torch.float64, device="cpu"))
            return self.scale * float(values.max())
        return self.scale if self.link in BOUNDED else math.inf


NEVER = Gate("hard", bias=-9.0, source="fixed")
"""Exactly 0 for every token: no step, no forgetting."""

ALWAYS = Gate("exp2", source="fixed")
"""Exactly 1 for every token, such as the step of linear attention."""


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast for the device of x; does nothing if autocast is off."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


SHORT = (torch.float16, torch.bfloat16)


def precise() -> torch.dtype:
    """The dtype of parameters of a `Precise` module: torch's default, or fp32 if that is
    shorter."""
    kind = torch.get_default_dtype()
    return torch.float32 if kind in SHORT else kind


class Precise(nn.Module):
    """A module whose parameters stay in fp32 when the model is cast to a shorter dtype."""

    def reset_fixed(self) -> None:
        """Recompute the buffers, after the module was allocated without values. A subclass with
        buffers defines it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Precise":
        def keep(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if y.dtype in SHORT else y

        return super()._apply(keep, recurse)


class Output(NamedTuple):
    """One gate of a layer: its name in the rule, how it is computed, and its number of values per
    token and head.

    `channels` is its own or, if it follows another gate, that gate's.
    """

    name: str
    gate: Gate
    width: int
    channels: str | None


def unread(rule: Rule, gates: Mapping[str, Gate]) -> str | None:
    """The reason to refuse gates that a rule does not read, or None."""
    read = rule.gates()
    own = [name for name in read if name not in pair_gates(rule)]
    known = {*read, *(f"{name}.{n}" for name in own for n in rule.memory.shapes(2, 2))}
    surplus = [name for name in gates if name not in known]
    return (
        f"gates {', '.join(surplus)} are not read by this rule, which reads {', '.join(read)}"
        if surplus
        else None
    )


def forget_refusal(rule: Rule, gates: Mapping[str, Gate]) -> str | None:
    """Why a channel-wise forget gate is not supported with the rule's retention, or None.

    If weights share a simplex, A_t = (1 - forget_t) A_{t-1} + step_t is the log-domain form of
    forgetting only if `forget` is the same for all of them (MIRAS eq. 27).
    """
    # Equal widths are valid for every memory, and which channels are single ones does not depend on
    # them.
    shapes = rule.memory.shapes(2, 2)
    for name, gate in gates.items():
        base, _, weight = name.partition(".")
        if base != "forget" or gate.channels is None or rule.retention.along not in (gate.channels, "all"):
            continue
        side = 0 if gate.channels == "input" else 1
        if any(shapes[n][side] > 1 for n in ([weight] if weight else shapes)):
            other = {"input": "output", "output": "input"}[gate.channels]
            way = "" if rule.retention.along == "all" else f" or channels={other!r}"
            return (
                f"gate {name} has channels={gate.channels!r}, along which {rule.retention} normalises, and "
                f"forgetting must be the same for all that share a simplex; give it channels=None{way}, or turn "
                f"the axis"
            )
    return None


def gate_outputs(rule: Rule, gates: Mapping[str, Gate], d_key: int, d_value: int) -> list[Output]:
    """The gates that a layer has for a rule; `name.weight` in `gates` is for one weight of the
    memory.

    Raises ValueError for a missing gate, and for channels that the weights do not share or the
    retention forbids.
    """
    missing = [name for name in rule.gates() if name not in gates]
    if missing:
        raise ValueError(f"Gates: the rule reads {', '.join(missing)}; give a Gate(...) for each")
    if reason := forget_refusal(rule, gates):
        raise ValueError(f"Gates: {reason}")
    weights = rule.memory.shapes(d_key, d_value)
    steps = rule.algorithm.steps

    def output(name: str, gate: Gate) -> Output:
        base, _, weight = name.partition(".")
        if gate.channels is None:
            return Output(name, gate, steps if base == "lr" else 1, None)
        if base in rule.bias.gates:
            if gate.channels == "input":
                raise ValueError(
                    f"Gates: {name} belongs to the values: its channels are 'output', not 'input'"
                )
            return Output(name, gate, d_value, "output")
        if base == "lr" and steps > 1:
            raise ValueError(
                f"Gates: with {steps} steps per token lr is one number for each step, not channel-wise"
            )
        side = 0 if gate.channels == "input" else 1
        found = {weights[n][side] for n in ([weight] if weight else weights)}
        if len(found) > 1:
            raise ValueError(
                f"Gates: the weights' {gate.channels} channels differ, {sorted(found)}: give {name} per_weight=True"
            )
        return Output(name, gate, found.pop(), gate.channels)

    found: list[Output] = []
    for base in rule.gates():
        own = [n for n in weights if gates[base].per_weight or f"{base}.{n}" in gates]
        own = [] if base in pair_gates(rule) else own
        if len(own) < len(weights) and gates[base].follows is None:
            found.append(output(base, gates[base]))
        found += [output(f"{base}.{n}", gates.get(f"{base}.{n}", gates[base])) for n in own]
    for base in rule.gates():
        leader = gates[base].follows
        if leader is None:
            continue
        led = [each for each in found if _base(each.name) == leader and each.gate.follows is None]
        if not led or steps > 1:
            raise ValueError(
                f"Gates: {base} follows {leader!r}, which must be a gate of the rule that follows none and has one "
                f"value per token"
            )
        names = {each.name for each in found}
        for each in led:
            name = base + each.name.removeprefix(leader)
            if name not in names:
                found.append(Output(name, gates[base], each.width, each.channels))
    return found


class Gates(Precise):
    """All gates that a rule reads, from x (B, T, hidden) to {name or name.weight: values}, in fp32.

    Values are (B, H, T); lr with several steps per token (B, H, T, steps); channel-wise (B, H, T,
    d_in, 1) or (B, H, T, 1, d_out). `lr` is multiplied by 1 - (the largest momentum), so that
    momentum does not lengthen the total step: a step of lr decays over 1 / (1 - momentum) tokens.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rule: Rule,
        gates: Mapping[str, Gate],
        head_dim: int,
        value_dim: int,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.made = gate_outputs(rule, gates, head_dim, value_dim)
        self.outputs = [(o.name, o.gate) for o in self.made]
        self.lr_factor = _lr_factor(rule, self.made, num_heads)
        made = {kind: [o for o in self.made if _kind(o) == kind] for kind in _KINDS}
        self.by_head, self.by_channel = made["head"], made["channel"]
        self.constant, self.fixed = made["constant"], made["fixed"]
        width = num_heads * sum(o.width for o in self.by_head)
        kind = precise()
        self.proj = nn.Linear(hidden_size, width, dtype=kind) if width else None
        self.channels = nn.ModuleList(
            ChannelGate(hidden_size, num_heads * o.width, o.gate.rank, kind) for o in self.by_channel
        )
        self.constants = nn.ParameterList(torch.empty(num_heads, o.width, dtype=kind) for o in self.constant)
        for i, o in enumerate(self.fixed):
            self.register_buffer(f"fixed{i}", self._first(o).clone(), persistent=False)
        self.rated = [o for o in self.made if o.gate.link == "decay"]
        self.log_rates = nn.ParameterList(torch.empty(num_heads, dtype=kind) for _ in self.rated)
        self.alike = _alike(self.made)
        self.together = [group for group in self.alike if _kind(group[0]) == "head"]
        self.sizes = [num_heads * sum(o.width for o in group) for group in self.together]

    def reset_parameters(self, std: float) -> None:
        """Small weights, so that x W has entries of about std * sqrt(hidden), and the biases that
        the gates name."""
        with torch.no_grad():
            if self.proj is not None:
                nn.init.normal_(self.proj.weight, std=std)
                self.proj.bias.copy_(torch.cat([self._first(o).flatten() for o in self.by_head]))
            for part, o in zip(self.channels, self.by_channel, strict=True):
                assert isinstance(part, ChannelGate)
                part.reset_parameters(std)
                part.up.bias.copy_(self._first(o).flatten())
            for constant, o in zip(self.constants, self.constant, strict=True):
                constant.copy_(self._first(o))
            for rate in self.log_rates:
                rate.uniform_(1, 16).log_()

    def reset_fixed(self) -> None:
        for i, o in enumerate(self.fixed):
            getattr(self, f"fixed{i}").copy_(self._first(o))

    def _first(self, o: Output) -> Tensor:
        """The initial biases of one gate, (H, width)."""
        by_head = torch.tensor(o.gate.first(self.num_heads), dtype=precise())
        if o.gate.spread:
            by_head = by_head + o.gate.spread * torch.rand(self.num_heads, dtype=precise())
        return by_head[:, None].expand(self.num_heads, o.width)

    def _inputs(self, x: Tensor) -> dict[str, Tensor]:
        """x W + b of every group of gates with a projection of its own, by the name of its first
        gate.

        (B, H, T, width), and (G, B, H, T, width) for a group of G > 1 gates.
        """
        B, T, H = x.shape[0], x.shape[1], self.num_heads
        raw: dict[str, Tensor] = {}
        if self.proj is not None:
            for group, part in zip(self.together, self.proj(x).split(self.sizes, -1), strict=True):
                parts = part.view(B, T, len(group), H, group[0].width).permute(2, 0, 3, 1, 4)
                raw[group[0].name] = parts if len(group) > 1 else parts[0]
        for i, o in enumerate(self.by_channel):
            raw[o.name] = self.channels[i](x).view(B, T, H, o.width).transpose(1, 2)
        for i, o in enumerate(self.constant):
            raw[o.name] = self.constants[i][None, :, None].expand(B, H, T, o.width)
        for i, o in enumerate(self.fixed):
            raw[o.name] = getattr(self, f"fixed{i}")[None, :, None].expand(B, H, T, o.width)
        return raw

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with without_autocast(x):
            raw = self._inputs(x.to(self.dtype()))
            rates = {o.name: self.log_rates[i] for i, o in enumerate(self.rated)}
            values: dict[str, Tensor] = {}
            for group in self.alike:
                first = name, gate, width, channels = group[0]
                z = raw[_source(first)]
                y = decay(z, rates[name][:, None, None]) if name in rates else LINKS[gate.link](z)
                scale = gate.scale * (self.lr_factor if _base(name) == "lr" else 1)
                y = y if scale == 1 else y * scale
                if channels is None:
                    y = y[..., 0] if width == 1 else y
                else:
                    y = y[..., None] if channels == "input" else y[..., None, :]
                parts = y.unbind() if len(group) > 1 else [y]
                values |= {o.name: part for o, part in zip(group, parts, strict=True)}
        return values

    def dtype(self) -> torch.dtype:
        """The dtype in which gates are computed."""
        if self.proj is not None:
            return self.proj.weight.dtype
        found = next(self.parameters(), None)
        found = next(self.buffers()) if found is None else found
        return found.dtype


class ChannelGate(nn.Module):
    """x W + b of a channel-wise gate, (..., hidden) to (..., width): through `rank` numbers, or
    none for 0."""

    def __init__(self, hidden_size: int, width: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False, dtype=dtype) if rank else None
        self.up = nn.Linear(rank or hidden_size, width, dtype=dtype)

    def reset_parameters(self, std: float) -> None:
        """Entries of x W as those of one matrix with deviation `std`."""
        if self.down is not None:
            hidden, rank = self.down.in_features, self.down.out_features
            nn.init.normal_(self.down.weight, std=hidden**-0.5)
            std *= (hidden / rank) ** 0.5
        nn.init.normal_(self.up.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x if self.down is None else self.down(x))


_KINDS = ("head", "channel", "constant", "fixed", "following")


def _base(name: str) -> str:
    """The gate of the rule that the gate of one weight belongs to."""
    return name.partition(".")[0]


def _alike(made: list[Output]) -> list[list[Output]]:
    """The outputs in order, grouped by those that one projection and one link compute together."""
    followed = {o.gate.follows for o in made}

    def making(o: Output) -> tuple[Any, ...]:
        base = _base(o.name)
        # each gate has its own rates
        alone = _kind(o) != "head" or o.gate.link == "decay" or base in followed
        return base, o.gate, o.width, o.name if alone else None

    return [list(group) for _, group in itertools.groupby(made, making)]


def _source(o: Output) -> str:
    """The output whose x W + b this one uses."""
    return o.name if o.gate.follows is None else o.gate.follows + o.name.removeprefix(_base(o.name))


def _kind(o: Output) -> str:
    if o.gate.follows is not None:
        return "following"
    if o.gate.source != "token":
        return o.gate.source
    return "head" if o.channels is None else "channel"


def _lr_factor(rule: Rule, outputs: list[Output], num_heads: int) -> float:
    """1 - (the largest momentum). Raises ValueError if steps could add up to more than the bound
    allows."""
    most = {
        base: [o.gate.largest(num_heads) for o in outputs if _base(o.name) == base] for base in rule.gates()
    }
    factor = 1.0
    if rule.algorithm.momentum:
        momentum = max(most["momentum"])
        factor = 1 - momentum
        if factor <= 0:
            raise ValueError(
                f"Gates: momentum must stay below 1 to be stable, so its scale must; got {momentum}"
            )
    if "forget" in most and max(most["forget"]) > 1:
        raise ValueError(
            f"Gates: forget must be at most 1, but this gate can be {max(most['forget']):g}; use one of the links "
            f"{', '.join(BOUNDED)} with a scale of at most 1"
        )
    bound, lr = rule.algorithm.step_bound, max(most["lr"])
    if math.isfinite(lr) and lr * factor * bound > 1 + 1e-6:
        raise ValueError(
            f"Gates: step_bound times the largest lr must be at most 1, got {bound} * {lr * factor:g}; lower the "
            f"scale of the lr gate, or give the step_bound that fits the largest momentum, 1 / (1 - m) = "
            f"{1 / factor:g}"
        )
    if rule.algorithm.momentum and 0 < bound < 1 / factor - 1e-6:
        raise ValueError(
            f"Gates: a step_bound of {bound} does not account for momentum of up to {1 - factor:g}; give "
            f"1 / (1 - m) = {1 / factor:g} or more, or 0 for none"
        )
    return factor
