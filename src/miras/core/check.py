"""Checks of the arguments of a scan, made before any work."""

import torch

from miras.core.rule import Call, Gates, Rule, State, carries_retained, carries_surprise, pair_gates, spelled
from miras.core.state import known


def check(rule: Rule, state: State, call: Call) -> None:
    """Raise ValueError if the arguments of a scan do not fit together; looks at shapes only."""
    q, k, v, initial = call.q, call.k, call.v, call.initial
    steps = rule.algorithm.steps
    if steps > 1:
        if k.dim() != 5 or k.shape[3] != steps or v.dim() != 5 or v.shape[3] != steps:
            raise ValueError(
                f"scan: with {steps} steps per token k must be (B, H, T, {steps}, Dk) and v (B, H, T, {steps}, Dv); "
                f"got k {tuple(k.shape)}, v {tuple(v.shape)}"
            )
        k_token, v_token = k[:, :, :, 0], v[:, :, :, 0]
    else:
        k_token, v_token = k, v
    if q.dim() != 4 or k_token.shape != q.shape or v_token.shape[:3] != q.shape[:3] or v_token.dim() != 4:
        raise ValueError(
            f"scan: q and k must be (B, H, T, Dk) and v (B, H, T, Dv); got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    B, H, T, d_key = q.shape
    want = rule.memory.shapes(d_key, v.shape[-1])
    got = {n: tuple(a.shape) for n, a in state.A.items()}
    check_state(rule, state, (B, H), d_key, v.shape[-1])
    _check_gates(rule, call.gates, want, (B, H, T), v.shape[-1])
    for name, mask in (("valid", call.valid), ("write", call.write), ("reset", call.reset)):
        if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
            raise ValueError(
                f"scan: {name} must be a bool mask (B, T) = {(B, T)}, got {mask.dtype} {tuple(mask.shape)}"
            )
    if call.reset is not None and initial is None:
        raise ValueError("scan: reset needs the initial accumulators; pass initial=A0")
    if rule.retention.returns and initial is None:
        raise ValueError(f"scan: {rule.retention} decays towards the initial accumulators; pass initial=A0")
    given = {n: tuple(a.shape) for n, a in (initial or {}).items()}
    if initial is not None and given != got:
        raise ValueError(f"scan: initial must have the shapes of the state's weights, {got}; got {given}")
    shapes = {n: (H, width) for n, (width, _) in rule.memory.outer(d_key, v.shape[-1]).items()}
    held = {n: tuple(p.shape) for n, p in call.outer.items()}
    if held != shapes:
        raise ValueError(
            f"scan: {rule.memory} needs the outer parameters {shapes or 'none'}; got {held or 'none'}; give them as "
            f"outer="
        )


def check_state(rule: Rule, state: State, rows: tuple[int, int], d_key: int, d_value: int) -> None:
    """Raise ValueError where a state is not one of this rule, for (B, H) rows and heads of these
    widths."""
    want = rule.memory.shapes(d_key, d_value)
    got = {n: tuple(a.shape) for n, a in state.A.items()}
    if got != {n: (*rows, *shape) for n, shape in want.items()}:
        raise ValueError(
            f"scan: the state belongs to another memory: for {rows[0]} rows, {rows[1]} heads and widths {d_key}, "
            f"{d_value} the weights are {want}, the state holds {got}"
        )
    parts = {
        "S": (bool(state.S), carries_surprise(rule), "momentum, or with one update per chunk,"),
        "retained": (bool(state.retained), carries_retained(rule), "a gradient at the decayed memory"),
        "past": (bool(state.past), rule.algorithm.window > 1, "a window"),
        "recent": (bool(state.recent), rule.algorithm.step_bound > 0, "the step bound"),
    }
    for name, (there, needed, why) in parts.items():
        if there != needed:
            raise ValueError(
                f"scan: the state belongs to another rule: it holds {'a' if there else 'no'} {name}, which rules "
                f"with {why} have; start from init_state(rule, A0)"
            )
    size = rule.by_step.chunk_size
    if state.past and state.past["key"].shape[2] != rule.algorithm.window - 1:
        there = state.past["key"].shape[2] + 1
        raise ValueError(
            f"scan: the state belongs to a rule with a window of {there} pairs, this one has {rule.algorithm.window}"
        )
    if state.recent and state.recent["key"].shape[2] != size:
        raise _other_chunks(rule)


def place(rule: Rule, state: State) -> list[int]:
    """The number of tokens that each row has read of its open chunk. Raises ValueError for more
    than a chunk."""
    steps = rule.algorithm.steps if rule.chunk_size > 1 else 1
    found = known(state.phase)
    if max(found, default=0) >= rule.chunk_size * steps:
        raise _other_chunks(rule)
    return [phase // steps for phase in found]


def _other_chunks(rule: Rule) -> ValueError:
    return ValueError(
        f"scan: the state belongs to a rule with another chunk size than this one's {rule.chunk_size}; "
        f"chunk_size is part of the model"
    )


def _check_gates(
    rule: Rule, gates: Gates, weights: dict[str, tuple[int, int]], tokens: tuple[int, int, int], d_value: int
) -> None:
    read, of_bias, of_pair = rule.gates(), rule.bias.gates, pair_gates(rule)
    steps = rule.algorithm.steps
    for (base, weight), gate in gates.items():
        name = spelled((base, weight))
        if base not in read or (weight and (weight not in weights or base in of_pair)):
            raise ValueError(f"scan: unknown gate {name!r}; this rule reads {', '.join(rule.gates())}")
        if base == "lr" and steps > 1:
            if gate.shape != (*tokens, steps):
                raise ValueError(
                    f"scan: gate {name!r} must be (B, H, T, steps) = {(*tokens, steps)}, got {tuple(gate.shape)}"
                )
            continue
        if gate.shape == tokens:
            continue
        if base in of_bias:
            allowed = [(1, d_value)] if base in rule.bias.channelwise else []
        else:
            mine = [weights[weight]] if weight else list(weights.values())
            allowed = [(mine[0][0], 1)] * (len({m[0] for m in mine}) == 1)
            allowed += [(1, mine[0][1])] * (len({m[1] for m in mine}) == 1)
            if (base == "lr" and not rule.algorithm.channelwise) or base in of_pair:
                allowed = []
            varies = gate.dim() == 5 and gate.shape[3:].numel() > 1 and ("output", "input")[gate.shape[3] > 1]
            if base == "forget" and varies and rule.retention.along in (varies, "all"):
                raise ValueError(
                    f"scan: gate {name!r} varies along the axis over which {rule.retention} normalises; forgetting "
                    f"must be constant there (MIRAS' log-domain form): give it per head or along the other axis; "
                    f"got {tuple(gate.shape)}"
                )
        if gate.dim() != 5 or gate.shape[:3] != tokens or tuple(gate.shape[3:]) not in allowed:
            choices = [tokens, *((*tokens, *tail) for tail in allowed)]
            raise ValueError(
                f"scan: gate {name!r} must be (B, H, T){' or channel-wise' if allowed else ''}, one of "
                f"{', '.join(map(str, choices))}; got {tuple(gate.shape)}"
            )
    for name in read:
        if (name, "") not in gates and not all((name, n) in gates for n in weights):
            raise ValueError(f"scan: gate {name!r} is missing; this rule reads {', '.join(rule.gates())}")
