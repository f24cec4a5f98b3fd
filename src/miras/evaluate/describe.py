"""A description of a config: choices, equations, gates, sizes and cost."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from miras.core.algorithm import GradientAscent, GradientDescent, Implicit, Muon
from miras.core.bias import L1, L2, Dot, Huber, LInf, Lp, Robust
from miras.core.memory import MLP, GatedMLP, Matrix, Vector
from miras.core.retention import (
    Bregman,
    ElasticNet,
    FDivergence,
    LqNorm,
    ProximalElasticNet,
    Sigmoid,
    Simplex,
)
from miras.core.rule import Rule
from miras.nn.config import AXES, ModelConfig
from miras.nn.feature_map import Identity
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.nn.memory import MemoryConfig, memories_in
from miras.nn.part import MixerConfig
from miras.zoo import SOURCES, preset, presets


def _mlp(m: MLP) -> str:
    y = "x"
    for i in range(1, m.depth + 1):
        y = f"{'gelu(' * (i > 1)}{y}{')' * (i > 1)} w{i}{f' + b{i}' * m.bias}"
    return _finished(m, y)


def _finished(m: Any, y: str) -> str:
    y = f"LN({y})" if m.norm else y
    y = f"gain {y} + shift" if getattr(m, "affine", False) else y
    return f"x + {y}" if m.residual else y


FORMULAS: dict[type, Callable[[Any], str]] = {
    Matrix: lambda _: "x w",
    Vector: lambda _: "x * w",
    MLP: _mlp,
    GatedMLP: lambda m: _finished(m, "(silu(x w1) * (x w3)) w2"),
    Dot: lambda _: "-<y, v>",
    L2: lambda _: "|y - v|^2 / 2",
    L1: lambda _: "sum |y - v|",
    Lp: lambda b: f"sum |y - v|^{b.p:g}" + (f", linear beyond {b.clip:g}" if b.clip else ""),
    LInf: lambda b: f"max |y - v|, smoothed by {b.tau:g}",
    Huber: lambda b: (
        f"Huber of y - v ({b.kind}), linear beyond {'delta_t' if b.delta is None else f'{b.delta:g}'}"
    ),
    Robust: lambda b: (
        f"max |y - v - e|^2 / 2 over |e|_{b.ball} <= {'radius_t' if b.radius is None else b.radius}"
    ),
    ElasticNet: lambda r: f"sign(A_t) max(0, |A_t| - {r.gamma:g})",
    LqNorm: lambda r: f"A_t{'' if r.literal else f' |A_t|^{r.q - 2:g}'} / ||A_t||_{r.q:g}^{r.q - 2:g}",
    Simplex: lambda r: f"c softmax(A_t) along {r.axis}",
    FDivergence: lambda r: f"c softmax(A_t) along {r.axis}",
    Bregman: lambda r: f"{r.inverse.__name__}(A_t)",
    Sigmoid: lambda _: "sigmoid(A_t)",
}
"""Formulas: memories as functions of x, biases of prediction y and value v, links of A_t."""

STEPS: dict[type, Callable[[Any], str]] = {
    GradientDescent: lambda _: "S_t",
    Implicit: lambda _: "S_t",
    GradientAscent: lambda _: "S_t",
    Muon: lambda a: f"{a.scale:g} NewtonSchulz_{a.iterations}(S_t)",
}
"""The step that an algorithm adds to the accumulator."""


def describe(config: ModelConfig) -> dict[str, Any]:
    """Everything `miras info` shows, as plain values for JSON. No weights are allocated."""
    with torch.device("meta"):
        model = LM(config)
        state = model.state_bytes()
    kinds = [each for i, each in enumerate(config.pattern) if each not in config.pattern[:i]]
    return {
        "layers": [each.name for each in config.mixers()],
        "mixers": [mixer(each, config.num_heads) for each in kinds],
        "parameters": model.num_parameters(),
        "state_bytes": state,
        "state_grows": config.grows(),
        "flops_per_token": model.flops_per_token(),
        "config": config.to_dict(),
    }


def mixer(config: MixerConfig, num_heads: int) -> dict[str, Any]:
    """A mixer of the pattern: its sizes in words, and its memories."""
    return {
        "name": config.name,
        "words": config.words(),
        "memories": [
            {
                "choices": choices(each.rule),
                "equations": equations(each.rule),
                "features": features(each),
                "gates": gates(each, num_heads),
            }
            for each in memories_in(config)
        ],
    }


def choices(rule: Rule) -> dict[str, dict[str, str]]:
    """The choice on each axis, as written in code, with the first sentence of its docstring."""
    shown: dict[str, dict[str, str]] = {}
    for axis in AXES:
        part = getattr(rule, axis)
        shown[axis] = {"choice": repr(part), "meaning": (type(part).__doc__ or "").strip().split("\n")[0]}
    return shown


READ = {"after": "W_t", "before": "W_{t-1}", "start": "W_anchor"}
"""The weights at which a token is read."""


def equations(rule: Rule) -> list[str]:
    """The equations of one head at token t, for this rule."""
    algorithm, retention = rule.algorithm, rule.retention
    lines: list[str] = []
    lr, sign = "lr_t", "+" if isinstance(algorithm, GradientAscent) else "-"
    if isinstance(algorithm, Implicit):
        lr = "lr_t / (1 + lr_t |k_t|^2)"
    if algorithm.step_bound:
        strength = "" if algorithm.step_bound == 1 else f"{algorithm.step_bound:g} "
        factor = f"max(0, 1 - {strength}lr_j |k_j . k_t|)"
        lines.append(f"b_t = prod_j {factor} over the earlier tokens j of the chunk")
        lr = f"b_t {lr}"
    anchor = "(prod_j (1 - forget_j)) W_anchor" if retention.decayed else "W_anchor"
    keep = "(1 - forget_t) A_{t-1}" if "forget" in retention.gates else "A_{t-1}"
    if retention.returns:
        keep = "A_0 + (1 - forget_t) (A_{t-1} - A_0)"
        if retention.decayed:
            anchor = "W_0 + (prod_j (1 - forget_j)) (W_anchor - W_0)"
    direction = STEPS.get(type(algorithm), lambda _: f"{type(algorithm).__name__}(S_t)")(algorithm)
    moved = f"A_t = {keep} + {direction}"
    if isinstance(retention, ProximalElasticNet):
        moved = f"A_t = S({keep} + {direction}), S(z) = sign(z) max(0, |z| - {retention.gamma:g})"
    elif isinstance(retention, FDivergence):
        moved = (
            f"A_t = A_{{t-1}} + log {retention.inverse.__name__}({direction} - zeta_t), sums held by zeta_t"
        )
    elif not retention.linear:
        moved = f"A_t = {type(retention).__name__}(A_{{t-1}}, {direction})"
    before = "momentum_t S_{t-1} " if algorithm.momentum else ""
    if rule.schedule.gathers:
        before = "S_{t-1} "
        moved = moved.replace("(1 - forget_t)", "(prod_j (1 - forget_j))")
        moved += f" after every {rule.chunk_size} tokens, then S_t = 0; else A_t = A_{{t-1}}"
    linked = FORMULAS.get(type(retention), lambda _: "link(A_t)")(retention)
    steps = [
        f"all this {algorithm.steps} times per token, with different keys and values; read after the last step"
    ]
    loss = "bias(M(k_t; W), v_t)"
    if algorithm.window > 1:
        loss = f"sum_i share_i bias(M(k_i; W), v_i), i = t - {algorithm.window - 1}, ..., t,"
    return [
        f"grad_t = d {loss} / d W at W = {anchor}, the weights at the start of t's chunk of {rule.chunk_size}",
        *lines,
        f"S_t = {before}{sign} {lr} grad_t",
        moved,
        "W_t = A_t" if retention.direct else f"W_t = {linked}",
        f"y_t = M(q_t; {READ[rule.schedule.read]})",
        *(steps if algorithm.steps > 1 else []),
        f"M(x) = {FORMULAS.get(type(rule.memory), lambda m: repr(m))(rule.memory)}",
        f"bias(y, v) = {FORMULAS.get(type(rule.bias), lambda b: repr(b))(rule.bias)}",
    ]


def gates(memory: MemoryConfig, num_heads: int) -> dict[str, dict[str, Any]]:
    """How each gate of the rule is computed from a layer's input x, and its largest value."""
    made, rule = memory.made(), memory.rule
    shown: dict[str, dict[str, Any]] = {}
    own = [name for name in memory.gates if "." in name]
    for name in (*rule.gates(), *own):
        gate = made[name]
        factor = 1.0
        if name.split(".")[0] == "lr" and rule.algorithm.momentum:
            factor = 1 - made["momentum"].largest(num_heads)
        largest = gate.largest(num_heads) * factor
        shown[name] = {
            "formula": f"{gate.scale * factor:.4g} {gate.link}({_inside(gate)})",
            "initial_bias": gate.bias,
            "largest": largest if math.isfinite(largest) else None,
            "per": _per(gate),
        }
    return shown


def _inside(gate: Gate) -> str:
    """The argument of a gate's link."""
    if gate.follows is not None:
        inside = f"that of {gate.follows}"
    elif gate.source != "token":
        inside = "b"
    else:
        inside = "x U V + b" if gate.channels and gate.rank else "x W + b"
    return f"{inside}, rate" if gate.link == "decay" else inside


def _per(gate: Gate) -> str:
    parts = ["head"] if gate.source != "token" else ["token", "head"]
    parts += ["weight"] * gate.per_weight + [f"{gate.channels} channel"] * (gate.channels is not None)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def features(config: MemoryConfig) -> str:
    """How queries, keys and values are computed, in words."""
    f = config.features
    words = ["linear", *(["convolution"] * (config.conv_size > 0))]
    made = [*words, f.activation, *(["length 1"] * f.normalize), *(["rotary"] * f.rotary)]
    keys = {"projected": "", "forget": "; k = forget", "query": "; k = q"}[f.keys]
    scaled = "; q / sqrt(width)" * f.scaled
    normalizer = "; the read is divided by max(1, |n|)" * f.normalizer
    mapped = "" if isinstance(config.feature_map, Identity) else f", {config.feature_map!r}"
    key, value = ("" if d is None else f", {d} wide" for d in (config.key_dim, config.value_dim))
    v = ", ".join([*words, f.values])
    return f"q, k: {', '.join(made)}{key}{mapped}{keys}{scaled}; v: {v}{value}{normalizer}"


def design_space() -> list[dict[str, Any]]:
    """The presets as points of the design space: one row each, for `miras list`."""
    rows: list[dict[str, Any]] = []
    shown = [axis for axis in AXES if axis != "schedule"]  # which is the same for all of them
    for name in presets():
        config = preset(name)
        row: dict[str, Any] = {"preset": name, "layers": " + ".join(each.name for each in config.pattern)}
        row |= {axis: "" for axis in (*shown, "gates")} | {"chunk": None, "source": SOURCES[name]}
        for memory in config.memories():
            row |= {axis: _short(getattr(memory.rule, axis)) for axis in shown}
            made = memory.made()
            row["gates"] = ", ".join(_named(gate, made[gate]) for gate in memory.rule.gates())
            row["chunk"] = memory.rule.chunk_size
        rows.append(row)
    return rows


def _short(part: Any) -> str:
    """An axis object with the fields that are not its defaults."""
    given = [
        f"{f.name}={getattr(part, f.name)!r}"
        for f in dataclasses.fields(part)
        if getattr(part, f.name) != f.default
    ]
    return f"{type(part).__name__}({', '.join(given)})" if given else type(part).__name__


def _named(name: str, gate: Gate) -> str:
    words = [
        *([gate.source] * (gate.source != "token")),
        *([f"by {gate.channels} channel"] * (gate.channels is not None)),
    ]
    words += [f"from {gate.follows}"] * (gate.follows is not None)
    return f"{name} ({', '.join(words)})" if words else name
