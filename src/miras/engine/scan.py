"""The dispatch: a rule states its form, a path the forms it supports; everything else runs the
recurrence."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from miras.core.bias import L2, Dot
from miras.core.check import check, place
from miras.core.memory import Matrix
from miras.core.observe import watching
from miras.core.recurrence import token_by_token
from miras.core.retention import Decay, Keep
from miras.core.rule import Call, Gates, Rule, State
from miras.core.state import Tree, ordinary
from miras.engine import channels, exact, graph, mlp
from miras.engine.chunks import by_chunks
from miras.engine.decode import decode, has_form
from miras.engine.dual import dual
from miras.engine.exact import blockwise, hebbian
from miras.engine.factors import has_factors
from miras.engine.formed import formed_per_token
from miras.engine.graph import in_graph
from miras.engine.per_chunk import per_chunk
from miras.engine.plan import Plan, plan

LONG = 256
"""Number of tokens from which on running the recurrence gives a warning."""


@ordinary
def scan(
    rule: Rule,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tree,
    *,
    valid: Tensor | None = None,
    write: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Tree | None = None,
    outer: Tree | None = None,
) -> tuple[Tensor, State]:
    """Any number of tokens through a memory: like `miras.recurrence`, on the fastest path.

    The result does not depend on where a stream is cut. Activation memory grows with the square
    root of T. A rule that no fast path supports runs token by token, and a long call warns about
    it.
    """
    call = Call.of(q, k, v, gates, valid, write, reset, initial, outer)
    return run(rule, state, call, planned(rule, state, call))


def planned(rule: Rule, state: State, call: Call) -> Plan:
    """The plan of a call whose tokens are not moved. Raises ValueError like `scan`."""
    check(rule, state, call)
    shape, masks = (call.q.shape[0], call.q.shape[2]), (call.valid, call.write, call.reset)
    return plan(shape, place(rule, state), call.q.device, *masks, watching("memory"), packed=False)


@ordinary
def run(rule: Rule, state: State, call: Call, plan: Plan) -> tuple[Tensor, State]:
    """A checked call, with padding at the end of rows, on the rule's fastest path."""
    way = way_of(rule, call, plan)
    if torch.compiler.is_compiling() and way is not ONE_TOKEN:
        return in_graph(on_its_way, rule, state, call, plan)
    return way.run(rule, state, call, plan)


def on_its_way(rule: Rule, state: State, call: Call, plan: Plan) -> tuple[Tensor, State]:
    """`run` outside of graphs."""
    return way_of(rule, call, plan).run(rule, state, call, plan)


def graphable() -> None:
    """Let `torch.compile` include memories in its graphs; the first call imports the compiler,
    which takes seconds."""
    graph.graphable(on_its_way)


def prepare(rule: Rule, plan: Plan) -> None:
    """Make the plan decide everything that `run` will need for this rule."""
    plan = plan.steps(rule.algorithm.steps)
    if rule.chunk_size == 1:
        plan.blocks(exact.BLOCK)
    plan.chunks(rule.by_step.chunk_size)


class Way(NamedTuple):
    """A fast path: the forms of rules that it supports (`Rule.form`), and its other conditions."""

    name: str
    forms: frozenset[str]
    fits: Callable[[Rule, Call, Plan], bool]
    run: Callable[[Rule, State, Call, Plan], tuple[Tensor, State]]


def ways(rule: Rule, call: Call, plan: Plan) -> list[Way]:
    """Every path that supports a call, the fastest first."""
    return [way for way in WAYS if rule.form <= way.forms and way.fits(rule, call, plan)]


def way_of(rule: Rule, call: Call, plan: Plan) -> Way:
    """The fastest path that supports a call, or the recurrence."""
    found = ways(rule, call, plan)
    if found:
        return found[0]
    if plan.tokens >= LONG:
        strange = ", ".join(sorted(min((rule.form - way.forms for way in WAYS), key=len)))
        warnings.warn(
            f"{rule} runs token by token, which is slow: no faster way serves {strange}", stacklevel=2
        )
    return RECURRENCE


def _recurrence(rule: Rule, state: State, call: Call, plan: Plan) -> tuple[Tensor, State]:
    return token_by_token(rule, state, call, plan.watch)


def _one_token(rule: Rule, call: Call, plan: Plan) -> bool:
    bare = call.valid is None and call.write is None and call.reset is None
    return bare and plan.tokens == 1 and plan.watch is None and not torch.is_grad_enabled() and has_form(rule)


def _is_exact(rule: Rule, call: Call, plan: Plan) -> bool:
    plain = (
        type(rule.memory) is Matrix and type(rule.bias) in (L2, Dot) and type(rule.retention) in (Decay, Keep)
    )
    return plain and rule.chunk_size == 1 and not _by_channel(rule, call.gates)


def _is_hebbian(rule: Rule, call: Call, plan: Plan) -> bool:
    plain = type(rule.memory) is Matrix and type(rule.bias) is Dot and type(rule.retention) in (Decay, Keep)
    channels = _by_channel(rule, call.gates)
    by_key = channels == ["forget"] and all(
        g.shape[4] == 1 for (n, _), g in call.gates.items() if n == "forget" and g.dim() == 5
    )
    return plain and rule.chunk_size == 1 and plan.watch is None and (by_key or not channels)


def _is_mlp(rule: Rule, call: Call, plan: Plan) -> bool:
    return has_factors(rule) and plan.watch is None and not _by_channel(rule, call.gates)


def _is_per_head(rule: Rule, call: Call, plan: Plan) -> bool:
    watched = plan.watch is not None and rule.algorithm.window > 1
    return not (watched or _by_channel(rule, call.gates))


def _unwatched(rule: Rule, call: Call, plan: Plan) -> bool:
    return plan.watch is None


def _gathers(rule: Rule, call: Call, plan: Plan) -> bool:
    return rule.schedule.gathers


def _always(rule: Rule, call: Call, plan: Plan) -> bool:
    return True


def _by_channel(rule: Rule, gates: Gates) -> list[str]:
    """Which gates of the update are channel-wise."""
    return [name for (name, _), g in gates.items() if name in rule.update_gates and g.dim() == 5]


MAPS = frozenset({"direction", "link"})
READS = frozenset({"read before", "read start"})
LINEAR = frozenset({"step_size", "step_bound", "steps", "decayed", "returns"})
DUAL = LINEAR | READS | {"momentum", "first_order", "window"}

ONE_TOKEN = Way("one token", LINEAR - {"steps"} | MAPS | {"momentum", "first_order"}, _one_token, decode)
WAYS = (
    ONE_TOKEN,
    Way("hebbian blocks", LINEAR, _is_hebbian, hebbian),
    Way("blocks", LINEAR | {"momentum"}, _is_exact, blockwise),
    Way(
        "per chunk",
        LINEAR | MAPS | READS | {"advance", "first_order", "scale", "update by chunk"},
        _gathers,
        partial(by_chunks, per_chunk),
    ),
    Way("mlp", DUAL - {"read start", "window"}, _is_mlp, partial(by_chunks, mlp.run, states=False)),
    Way("per head", DUAL, _is_per_head, partial(by_chunks, dual)),
    Way("by channel", LINEAR | {"first_order", "link"}, _unwatched, partial(by_chunks, channels.run)),
    Way(
        "formed",
        LINEAR | MAPS | {"momentum", "first_order", "scale"},
        _always,
        partial(by_chunks, formed_per_token),
    ),
)
"""The fastest first."""

RECURRENCE = Way("recurrence", frozenset(), _always, _recurrence)
