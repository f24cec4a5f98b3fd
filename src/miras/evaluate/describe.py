"""What a config says, in words and numbers: the four choices, their equations, gates, sizes and cost."""

from typing import Any

import torch

from miras.core.retention import Retention
from miras.core.rule import Rule
from miras.nn.config import AXES, ModelConfig
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.nn.memory import DEFAULT_GATES

LARGEST = {"sigmoid": 1.0, "hard": 1.0}
"""The largest value of each link of a gate that has one."""


def describe(config: ModelConfig) -> dict[str, Any]:
    """Everything `miras info` shows, as plain values for JSON. No weight is made, whatever the sizes."""
    with torch.device("meta"):
        model = LM(config)
        state = model.state_bytes()
    names = [config.mixer(layer) for layer in range(config.num_hidden_layers)]
    attends = any(name != "memory" for name in names)
    writes = any(name != "attention" for name in names)
    return {
        "layers": names,
        "memory": choices(config.rule) if writes else None,
        "equations": equations(config.rule) if writes else None,
        "gates": gates(config) if writes else None,
        "window_size": config.window_size if attends else None,
        "num_persistent": config.num_persistent if attends else 0,
        "parameters": model.num_parameters(),
        "state_bytes": state,
        "state_grows": attends and config.window_size is None,
        "flops_per_token": model.flops_per_token(),
        "config": config.to_dict(),
    }


def choices(rule: Rule) -> dict[str, dict[str, str]]:
    """Each axis's choice as it is written, and what it is: the first sentence of its docstring."""
    shown: dict[str, dict[str, str]] = {}
    for axis in AXES:
        part = getattr(rule, axis)
        shown[axis] = {"choice": repr(part), "meaning": (type(part).__doc__ or "").strip().split("\n")[0]}
    return shown


def equations(rule: Rule) -> list[str]:
    """What one head does with token t, written for this rule."""
    lr = "lr_t"
    lines: list[str] = []
    if rule.algorithm.step_bound:
        lr = "b_t lr_t"
        strength = "" if rule.algorithm.step_bound == 1 else f"{rule.algorithm.step_bound:g} "
        factor = f"max(0, 1 - {strength}lr_j |k_j . k_t|)"
        lines.append(f"b_t = prod_j {factor} over the earlier tokens j of the chunk")
    anchor = "W_anchor"
    if rule.retention.decayed:
        anchor = "(prod_j (1 - forget_j)) W_anchor"
    linked = type(rule.retention).link is not Retention.link
    momentum = "momentum_t S_{t-1} " if rule.algorithm.momentum else ""
    return [
        f"grad_t = d bias(M(k_t; W), v_t) / d W at W = {anchor}, the weights at the start of t's chunk of "
        f"{rule.chunk_size}",
        *lines,
        f"S_t = {momentum}- {lr} grad_t",
        "A_t = (1 - forget_t) A_{t-1} + S_t",
        "W_t = link(A_t)" if linked else "W_t = A_t",
        "y_t = M(q_t; W_t)",
    ]


def gates(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """How each gate that the rule reads is made from a layer's input x, and the largest it can be."""
    made = DEFAULT_GATES | dict(config.gates)
    shown: dict[str, dict[str, Any]] = {}
    for name in config.rule.gates():
        gate: Gate = made[name]
        scale = gate.scale
        if name == "lr" and config.rule.algorithm.momentum:
            scale *= 1 - made["momentum"].scale
        shown[name] = {
            "formula": f"{scale:.4g} {gate.link}(x W + b)",
            "initial_bias": gate.bias,
            "largest": scale * LARGEST[gate.link] if gate.link in LARGEST else None,
            "per": "token, head and weight" if gate.per_weight else "token and head",
        }
    return shown
