"""The memory as a layer: project, gate, scan, normalise, gate, project."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.core.algorithm import GradientDescent
from miras.core.bias import L2
from miras.core.check import check_state, place
from miras.core.memory import MLP, Matrix, Memory
from miras.core.retention import Decay, Retention
from miras.core.rule import Call, Rule, State, anchor_weights, base_of, formed, init_state, named, weights
from miras.core.state import Record, Tree
from miras.core.typed import Typed
from miras.engine import prepare, run
from miras.engine.decode import compiles
from miras.engine.plan import Plan
from miras.layers.attention import rotate
from miras.nn.attention import rotary_refusal
from miras.nn.feature_map import FeatureMap, Identity
from miras.nn.gates import (
    Gate,
    Gates,
    Precise,
    forget_refusal,
    gate_outputs,
    precise,
    unread,
    without_autocast,
)
from miras.nn.mixer import Mixer, Projection
from miras.nn.norm import RMSNorm, unit
from miras.nn.part import LARGEST, MixerConfig, Sizes, check_sizes


@dataclass(frozen=True)
class MemoryState(Record):
    """A memory layer's state: the memory's own, and the tail of each convolution (B, conv_size - 1,
    width).

    position: with rotary features "next" (B,) int64, the position of the next token in its
    document; else empty.
    """

    memory: State
    tails: Tree
    position: Tree = field(default_factory=dict[str, Tensor])


TITANS_RULE = Rule(
    memory=MLP(),
    retention=Decay(towards="initial"),
    algorithm=GradientDescent(momentum=True, step_bound=10.0),
)
"""Titans' memory (NeurIPS version): two layers, expansion 4, momentum, forgetting, chunks of 16."""

DEFAULT_GATES: dict[str, Gate] = {
    "lr": Gate(scale=0.25),
    "momentum": Gate(scale=0.9),
    "forget": Gate(bias=-5.0),
    "delta": Gate("softplus", bias=0.5413),
    "radius": Gate("softplus", bias=-2.25),
    "share": Gate(),
}
"""Stable gates (docs/stability.md): momentum below 0.9, `lr` at most 0.25 (times 0.1), little
forgetting; Huber's threshold initially about 1 and the radius of the robust bias about 0.1."""


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1: positive, the feature map of linear attention (Katharopoulos et al. 2020, eq.
    7)."""
    # because the gradient of its elu has other strides than it claims
    if torch.compiler.is_compiling():
        return torch.where(x > 0, x, torch.expm1(x.clamp(max=0))) + 1
    return F.elu(x) + 1


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "identity": identity, "elu1": elu1}


@dataclass(frozen=True)
class Features(Typed):
    """How queries, keys and values are computed from their projections, and how the read is scaled.

    activation of q and k, values: that of v: "silu", "identity", "elu1" (elu + 1). normalize: q and
    k have unit length. scaled: q times Dk^-1/2, Dk its width. rotary: rotary positions of q and k
    in the document (RetNet). keys: "projected"; "forget", the channel-wise forget gate itself
    (HGRN2: k = 1 - keep); "query", the q of the same token, a control. normalizer: a constant 1 is
    appended to v, and the read is divided by max(1, |its read|) (mLSTM). Raises ValueError for an
    unknown choice.
    """

    activation: str = "silu"
    values: str = "silu"
    normalize: bool = True
    scaled: bool = False
    rotary: bool = False
    keys: Literal["projected", "forget", "query"] = "projected"
    normalizer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("activation", tuple(ACTIVATIONS)),
            ("values", tuple(ACTIVATIONS)),
            ("keys", ("projected", "forget", "query")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Features: unknown {name} {getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )

    def refusal(self, rule: Rule, gates: Mapping[str, Gate], key_dim: int) -> str | None:
        """Why these features are not supported for a memory with that rule, gates and key width, or
        None."""
        if self.rotary and (reason := rotary_refusal(key_dim)):
            return reason
        if rule.algorithm.steps > 1 and (self.rotary or self.keys != "projected"):
            return "with several steps per token each has a key of its own: keys='projected', rotary=False"
        if self.keys == "forget":
            forget = gates.get("forget")
            if "forget" not in rule.retention.gates or forget is None or forget.channels != "input":
                return "keys='forget' takes the forget gate as key: a retention that has one, with channels='input'"
            if forget.per_weight or not isinstance(rule.memory, Matrix):
                return "keys='forget' needs one forget gate of the width of a key: a Matrix memory, per_weight=False"
        return None


RULE_PARTS = tuple(f.name for f in dataclasses.fields(Rule) if f.init)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(MixerConfig):
    """A memory as a sequence layer: a `MemoryLayer`.

    rule: its choices, whose fields (memory, bias, retention, algorithm, chunk_size, schedule)
    `changed` accepts too; gates: gates that differ from `DEFAULT_GATES`, by name, or by name.weight
    for one weight of the memory; conv_size: taps of the convolutions after the projections, 0 for
    none; initial_scale: standard deviation of the initial memory times sqrt(d_in); features: how
    queries, keys and values are computed; key_dim, value_dim: the widths of a head's keys and
    values, by default that of the head; feature_map: applied to q and k last, before the memory.
    Raises ValueError for gates that the rule does not read.
    """

    name: ClassVar[str] = "memory"

    rule: Rule = TITANS_RULE
    gates: Mapping[str, Gate] = field(default_factory=dict[str, Gate])
    conv_size: int = 4
    initial_scale: float = 1.0
    features: Features = Features()
    key_dim: int | None = None
    value_dim: int | None = None
    feature_map: FeatureMap = Identity()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.feature_map, FeatureMap):  # pyright: ignore
            raise ValueError(
                f"MemoryConfig: feature_map must be a FeatureMap, such as Polynomial(), got {self.feature_map!r}"
            )
        if not isinstance(self.rule, Rule) or not isinstance(self.gates, Mapping):  # pyright: ignore
            raise ValueError(
                f"MemoryConfig: rule must be a Rule(...) and gates a mapping from names to Gate(...), got "
                f"{self.rule!r} and {self.gates!r}"
            )
        check_sizes(self, conv_size=0, initial_scale=0, key_dim=1, value_dim=1)
        check_sizes(self.rule, chunk_size=1)
        if reason := unread(self.rule, self.gates) or forget_refusal(self.rule, self.gates):
            raise ValueError(f"MemoryConfig: {reason}")

    def build(self, sizes: Sizes) -> "MemoryLayer":
        return MemoryLayer(
            sizes.hidden_size,
            sizes.num_heads,
            head_dim=sizes.head_dim,
            rope_theta=sizes.rope_theta,
            norm_eps=sizes.norm_eps,
            **vars(self),
        )

    def made(self) -> dict[str, Gate]:
        """Every gate, by name."""
        return DEFAULT_GATES | dict(self.gates)

    def stride(self) -> int:
        return self.rule.chunk_size

    def widths(self, sizes: Sizes) -> tuple[int, int]:
        """Dk and Dv, the widths of a head's key and value as they are projected."""
        key, value = (sizes.width() if d is None else d for d in (self.key_dim, self.value_dim))
        return key, value

    def held(self, sizes: Sizes) -> tuple[int, int]:
        """The widths of the memory's inputs: the key after its feature map, the value with the
        normalizer's constant."""
        key, value = self.widths(sizes)
        return self.feature_map.width(key), value + self.features.normalizer

    def refusal(self, sizes: Sizes) -> str | None:
        if reason := self.features.refusal(self.rule, self.made(), self.widths(sizes)[0]):
            return f"{self.features} has no meaning here: {reason}"
        key, value = self.held(sizes)
        if self.features.keys == "forget" and not isinstance(self.feature_map, Identity):
            return (
                f"{self.feature_map} maps keys, and keys='forget' takes those of the memory; use Identity()"
            )
        if key > LARGEST:
            return f"{self.feature_map} makes keys {key:,} wide, more than a tensor can be; give a smaller key_dim"
        try:
            self.rule.memory.shapes(key, value)
        except ValueError as error:
            return str(error)
        return None

    def names(self) -> set[str]:
        return {*vars(self), *RULE_PARTS}

    def changed(self, values: Mapping[str, Any], like: Sequence[MixerConfig] = ()) -> Self:
        """As in any mixer; `gates` replace the named gates, and gates that the new rule does not
        read are dropped.

        An exact error-correcting rule (chunk_size 1, L2) that is given larger chunks also gets a
        step bound, or a repeated key would make it diverge; a given `algorithm` is used unchanged.
        """
        rule = values.get("rule", self.rule)
        rule = dataclasses.replace(rule, **{n: values[n] for n in RULE_PARTS if n in values})
        gates = values.get("gates", {})
        exact = self.stride() == 1 and isinstance(rule.bias, L2) and not rule.algorithm.step_bound
        if exact and rule.chunk_size > 1 and not values.keys() & {"rule", "algorithm"}:
            largest = (self.made() | gates)["lr"].largest(1)
            bound = 1 / largest if 1 < largest < math.inf else 1.0
            rule = dataclasses.replace(rule, algorithm=dataclasses.replace(rule.algorithm, step_bound=bound))
        gates = {n: gate for n, gate in self.gates.items() if not unread(rule, {n: gate})} | gates
        own = {n: values[n] for n in vars(self) if n in values}
        return dataclasses.replace(self, **own | {"rule": rule, "gates": gates})

    def reading_flops(self, sizes: Sizes) -> int:
        """FLOPs of a `MemoryReader`.

        Each weight (d_in, d_out) is multiplied with the key, backward unless it is the first, with
        the query for A and S, and twice in the update; in a chunk of C tokens two more products (C
        d_in and C d_out) relate each token to the others. If a map, or gates by channel with
        momentum, require weights per token, it is multiplied with the key, backward, with the
        query, and once in the rank-one update. All of this is times the steps per token.
        """
        D, H, rule = sizes.hidden_size, sizes.num_heads, self.rule
        (d_key, d_value), held = self.widths(sizes), self.held(sizes)
        n, momentum = rule.algorithm.steps, rule.algorithm.momentum
        C = 1 if rule.chunk_size == 1 else rule.chunk_size * n
        outputs = gate_outputs(rule, self.made(), *held)
        total = 2 * D * H * (d_key * (1 + n * (self.features.keys == "projected")) + n * d_value)
        for _, gate, size, channels in outputs:
            if gate.source == "token" and gate.follows is None:
                low = gate.rank if channels else 0
                total += 2 * D * low + 2 * low * H * size if low else 2 * D * H * size
        formed = momentum and any(o.channels for o in outputs if o.name.split(".")[0] not in rule.bias.gates)
        formed = formed or not (rule.retention.direct and rule.algorithm.direct) or rule.memory.elementwise
        for i, (d_in, d_out) in enumerate(rule.memory.shapes(*held).values()):
            passes = 1 + (i > 0) + (2 if formed else (1 + momentum) * 2)
            total += n * 2 * H * (passes * d_in * d_out + (0 if formed else C * (d_in + d_out)))
        return total

    def flops(self, sizes: Sizes) -> int:
        return self.reading_flops(sizes) + 2 * 2 * sizes.num_heads * self.widths(sizes)[1] * sizes.hidden_size


def memories_in(mixer: MixerConfig) -> list[MemoryConfig]:
    """The memories of a mixer, in the order of its fields."""
    return [part for part in mixer.walk() if isinstance(part, MemoryConfig)]


class InitialMemory(Precise):
    """The learned initial accumulators A_0, {weight: (H, d_in, d_out)}, in fp32."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], num_heads: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_heads, *shape, dtype=precise())))

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {tuple(a.shape)}" for name, a in self.named_parameters())

    def reset_parameters(self, retention: Retention) -> None:
        """The retention's initial accumulators for weights with standard deviation
        scale / sqrt(d_in); 0 for additive vectors."""
        for a in self.parameters():
            vector = a.shape[1] == 1 and a.shape[2] > 1
            if not self.scale or vector:
                nn.init.zeros_(a)
                continue
            nn.init.normal_(a)
            with torch.no_grad():
                a.copy_(retention.begin(a, self.scale * a.shape[1] ** -0.5))

    def forward(self, rows: int) -> dict[str, Tensor]:
        return {name: a.expand(rows, *a.shape) for name, a in self.named_parameters()}


class OuterParameters(Precise):
    """A memory's outer parameters, {name: (H, width)}, in fp32; empty for most memories."""

    def __init__(self, memory: Memory, num_heads: int, d_key: int, d_value: int) -> None:
        super().__init__()
        made = memory.outer(d_key, d_value)
        self.names = tuple(made)
        for name, (width, value) in made.items():
            first = torch.full((num_heads, width), value, dtype=precise())
            self.register_parameter(name, nn.Parameter(first))

    def forward(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}


class MemoryReader(Mixer):
    """From x (B, T, hidden) to the memory's reads, (B, T, H * Dv).

    q, k: linear, convolution, SiLU, l2 norm; v: linear, convolution, SiLU, unless `features` say
    otherwise; gates: linear and link. With several steps per token k and v have that many parts.
    The scan runs in fp32 for any dtype of x.
    """

    def __init__(self, sizes: Sizes, config: MemoryConfig) -> None:
        super().__init__()
        self.hidden_size = hidden_size = sizes.hidden_size
        if reason := config.refusal(sizes):
            raise ValueError(f"MemoryReader: {reason}")
        rule, features, conv_size, num_heads = config.rule, config.features, config.conv_size, sizes.num_heads
        (key_dim, value_dim), held = config.widths(sizes), config.held(sizes)
        shapes = rule.memory.shapes(*held)
        if config.initial_scale == 0 and sum(d_in > 1 for d_in, _ in shapes.values()) > 1:
            raise ValueError(
                f"MemoryReader: initial_scale=0 leaves a memory of {len(shapes)} weights where no gradient can move "
                f"it; give a positive initial_scale"
            )
        self.rule, self.num_heads, self.features, self.rope_theta = (
            rule,
            num_heads,
            features,
            sizes.rope_theta,
        )
        steps, activation = rule.algorithm.steps, ACTIVATIONS[features.activation]
        self.q = Projection(hidden_size, num_heads * key_dim, conv_size, activation)
        if features.keys == "projected":
            self.k = Projection(hidden_size, num_heads * steps * key_dim, conv_size, activation)
        self.v = Projection(
            hidden_size, num_heads * steps * value_dim, conv_size, ACTIVATIONS[features.values]
        )
        self.phi = config.feature_map.build(key_dim, num_heads)
        self.paths = ("q", "k", "v") if features.keys == "projected" else ("q", "v")
        self.gates = Gates(hidden_size, num_heads, rule, config.made(), *held)
        self.A0 = InitialMemory(shapes, num_heads, config.initial_scale)
        self.outer = OuterParameters(rule.memory, num_heads, *held)
        self.widths = held
        self.keys = {name: named(name) for name, _ in self.gates.outputs}
        for name in self.paths:
            getattr(self, name).reset_parameters()
        self.A0.reset_parameters(rule.retention)
        self.gates.reset_parameters(hidden_size**-0.5 / 4)

    def initial(self, rows: int, like: Tensor) -> MemoryState:
        tails = {name: like.new_zeros(rows, *getattr(self, name).tail) for name in self.paths}
        memory = init_state(self.rule, self.A0(rows))
        position = {"next": torch.zeros_like(memory.phase)} if self.features.rotary else {}
        return MemoryState(memory, tails, position)

    def place(self, state: MemoryState) -> list[int]:
        return place(self.rule, state.memory)

    def fits(self, state: MemoryState, rows: int) -> None:
        if state.tails.keys() != set(self.paths) or bool(state.position) != self.features.rotary:
            raise ValueError(
                "the state belongs to another layer: its features have other projections, or no rotary positions"
            )
        check_state(self.rule, state.memory, (rows, self.num_heads), *self.widths)

    def prepare(self, plan: Plan) -> None:
        prepare(self.rule, plan)

    def one_graph(self, plan: Plan) -> bool:
        size = self.rule.chunk_size
        return compiles(self.rule) and (size == 1 or all((at + 1) % size for at in plan.place))

    def mix(self, x: Tensor, state: MemoryState, plan: Plan) -> tuple[Tensor, MemoryState]:
        parts, tails, precise = {}, {}, self.gates.dtype()
        for name in self.paths:
            y, tails[name] = getattr(self, name)(x, state.tails[name], plan)
            parts[name] = y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).to(precise)
        gates, position = self.gates(x), state.position
        with without_autocast(x):
            q, k, v = self._inputs(parts, gates)
            if self.features.rotary:
                at, position = places(position["next"], plan, x.shape[1])
                q, k = rotate(q, at, self.rope_theta), rotate(k, at, self.rope_theta)
            q, k = self.phi(q), self.phi(k)
            needed = plan.reset is not None or "returns" in self.rule.form
            call = Call(
                q,
                k,
                v,
                {self.keys[name]: gate for name, gate in gates.items()},
                plan.valid(),
                plan.write,
                plan.reset,
                self.A0(x.shape[0]) if needed else None,
                self.outer(),
            )
            y, memory = run(self.rule, state.memory, call, plan)
        return self._answer(y).transpose(1, 2).flatten(2).to(x.dtype), MemoryState(memory, tails, position)

    def weights(self, state: State) -> Tree:
        """The weights W that the memory has in a state, {weight: (B, H, d_in, d_out)}."""
        return weights(self.rule, state.A, base_of(self.rule, self.A0(len(state.phase))))

    def recall(self, asked: Tensor, anchor: Tree, position: Tree, plan: Plan) -> Tensor:
        """Reads of a memory with this anchor for queries (B, T, H * Dk), (B, T, H * Dv), without
        writing."""
        q = asked.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).to(self.gates.dtype())
        with without_autocast(asked):
            q = self._scaled(self._sized(q))
            if self.features.rotary:
                q = rotate(q, places(position["next"], plan, q.shape[2])[0], self.rope_theta)
            then = anchor_weights(self.rule, anchor, base_of(self.rule, self.A0(asked.shape[0])))
            y = self._answer(self.rule.memory.apply(self.phi(q), formed(then, self.outer())))
        return y.transpose(1, 2).flatten(2).to(asked.dtype)

    def _sized(self, q: Tensor) -> Tensor:
        return unit(q) if self.features.normalize else q

    def _scaled(self, q: Tensor) -> Tensor:
        return q * q.shape[-1] ** -0.5 if self.features.scaled else q

    def _answer(self, y: Tensor) -> Tensor:
        return y[..., :-1] / y[..., -1:].abs().clamp_min(1) if self.features.normalizer else y

    def _inputs(self, parts: Tree, gates: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, Dk), k and v as the scan takes them, but for rotation and the feature map."""
        features, steps = self.features, self.rule.algorithm.steps
        q, v = self._sized(parts["q"]), parts["v"]
        if steps > 1:
            parts["k"], v = (x.unflatten(-1, (steps, -1)) for x in (parts["k"], v))
        if features.keys == "projected":
            k = self._sized(parts["k"])
        else:
            k = q if features.keys == "query" else gates["forget"][..., 0]
        if features.normalizer:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        return self._scaled(q), k, v


def places(start: Tensor, plan: Plan, T: int) -> tuple[Tensor, Tree]:
    """Each token's position in its document, (B, T) int64, and {"next": the position after the last
    one}."""
    if T == 0:
        return start[:, None].expand(-1, 0), {"next": start}
    step = torch.arange(T, device=start.device)
    at = start[:, None] + step
    if plan.reset is not None:
        begun = torch.where(plan.reset, step + 1, 0).cummax(1).values
        at = torch.where(begun > 0, step + 1 - begun, at)
    if plan.length is None:
        return at, {"next": at[:, -1] + 1}
    last = at.gather(1, (plan.length - 1).clamp_min(0)[:, None])[:, 0]
    return at, {"next": torch.where(plan.length > 0, last + 1, start)}


class MemoryOptions(TypedDict, total=False):
    """The fields of a `MemoryConfig` except its rule."""

    gates: Mapping[str, Gate]
    conv_size: int
    initial_scale: float
    features: Features
    key_dim: int | None
    value_dim: int | None
    feature_map: FeatureMap


class MemoryLayer(Mixer):
    """A memory as a drop-in sequence layer (Titans' LMM): out(norm(read) * silu(gate(x))).

    hidden_size, num_heads; `rule`: its choices; `head_dim`: the width of a head (default
    hidden_size / num_heads); `rope_theta`: the base of rotary positions if `features` use them; all
    others as in `MemoryConfig`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rule: Rule = TITANS_RULE,
        *,
        head_dim: int | None = None,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
        **memory: Unpack[MemoryOptions],
    ) -> None:
        super().__init__()
        sizes = Sizes(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, rope_theta=rope_theta)
        self.hidden_size = hidden_size
        config = MemoryConfig(rule=rule, **memory)
        self.reader = MemoryReader(sizes, config)
        value_dim = config.widths(sizes)[1]
        self.norm = RMSNorm(value_dim, eps=norm_eps)
        self.gate = nn.Linear(hidden_size, num_heads * value_dim, bias=False)
        self.out = nn.Linear(num_heads * value_dim, hidden_size, bias=False)
        for linear in (self.gate, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def initial(self, rows: int, like: Tensor) -> MemoryState:
        return self.reader.initial(rows, like)

    def place(self, state: MemoryState) -> list[int]:
        return self.reader.place(state)

    def fits(self, state: MemoryState, rows: int) -> None:
        self.reader.fits(state, rows)

    def prepare(self, plan: Plan) -> None:
        self.reader.prepare(plan)

    def one_graph(self, plan: Plan) -> bool:
        return self.reader.one_graph(plan)

    def mix(self, x: Tensor, state: MemoryState, plan: Plan) -> tuple[Tensor, MemoryState]:
        read, state = self.reader.mix(x, state, plan)
        read = self.norm(read.unflatten(-1, (self.reader.num_heads, -1))).flatten(-2)
        return self.out(read * F.silu(self.gate(x))), state
