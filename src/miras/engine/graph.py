"""Memories in graphs of `torch.compile`: the call of a memory is one operation that the compiler
traces."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from miras.core.rule import Call, Held, Rule, State
from miras.engine.plan import Plan

Run = Callable[[Rule, State, Call, Plan], tuple[Tensor, State]]

_TAKEN: list[Any] = []
"""The operation in graphs, after `graphable` was called."""


def in_graph(run: Run, rule: Rule, state: State, call: Call, plan: Plan) -> tuple[Tensor, State]:
    """`run` inside a graph; a plan with masks belongs to one batch and causes a graph break."""
    if _TAKEN and plan.bare():
        y, after = _TAKEN[0](rule.held, plan, _held(state), _held(call))
        return y, State(**after)
    outside: Any = torch.compiler.disable(run)
    return outside(rule, state, call, plan)


def graphable(run: Run) -> None:
    """Let `torch.compile` include calls of memories in its graphs. Imports the compiler, which
    takes seconds."""
    if _TAKEN:
        return
    from torch._dynamo import nonstrict_trace

    for kind in (Held, Plan):
        pytree.register_constant(kind)

    def taken(held: Held, plan: Plan, state: Any, call: Any) -> tuple[Tensor, dict[str, Any]]:
        y, after = run(held.rule, State(**state), Call(**call), plan)
        return y, _held(after)

    _TAKEN.append(nonstrict_trace(taken))


def _held(record: State | Call) -> dict[str, Any]:
    """The contents of a record by field name: graphs support plain containers without None."""
    held = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: value for name, value in held.items() if value is not None}
