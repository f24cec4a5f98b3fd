"""One token at a time without a graph is the recurrence and the scan: reads and every tensor of the state."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import miras
from cases import RULES, Problem, by_way, each, name, same
from miras.core.algorithm import GradientDescent
from miras.core.memory import MLP, GatedMLP, Matrix
from miras.core.observe import observe
from miras.core.recurrence import recurrence
from miras.core.retention import Keep, ProximalElasticNet
from miras.core.rule import Call, Rule, State, init_state
from miras.core.state import ordinary
from miras.engine import scan
from miras.engine.decode import decode
from miras.engine.scan import ONE_TOKEN, planned, way_of

TITANS = Rule(MLP(expansion=2), algorithm=GradientDescent(momentum=True, step_bound=10.0), chunk_size=5)
KEEPING = tuple(
    Rule(memory, retention=Keep(), algorithm=GradientDescent(momentum, bound), chunk_size=size)
    for memory in (Matrix(), MLP(depth=3, expansion=2, bias=True, affine=True))
    for momentum, bound in ((False, 0.0), (False, 2.0), (True, 2.0))
    for size in (1, 3)
)
TAKEN = (
    TITANS,
    *KEEPING,
    *(
        rule
        for rule in RULES
        if type(rule.memory) in (Matrix, MLP) and rule.form <= ONE_TOKEN.forms
        if rule.chunk_size < 16
    ),
)
T = 7


def piece(problem: Problem, cut: slice) -> dict:
    """Arguments of a scan for some of the tokens."""
    q, k, v = (x[:, :, cut] for x in (problem.q, problem.k, problem.v))
    gates = {n: g[:, :, cut] for n, g in problem.gates.items()}
    start = {n: a.expand(len(q), *a.shape) for n, a in problem.A0.items()}
    return {"q": q, "k": k, "v": v, "gates": gates, "initial": start, "outer": problem.outer}


def begun(problem: Problem) -> State:
    """A state whose rows have read 0, 1 and 2 tokens: each at a place of its own, as sessions side by side are."""
    valid = torch.arange(2) < torch.arange(problem.B)[:, None]
    state = init_state(problem.rule, problem.start())
    return recurrence(problem.rule, state, **piece(problem, slice(0, 2)), valid=valid)[1]


def one_by_one(function: Callable, problem: Problem, state: State) -> tuple[dict[str, Tensor], State]:
    """Reads of one call for each token, with every tensor of the last state, and that state."""
    reads = []
    for t in range(2, 2 + T):
        y, state = function(problem.rule, state, **piece(problem, slice(t, t + 1)))
        reads.append(y)
    return {"y": torch.cat(reads, 2)} | state.tensors(), state


def decoded(rule: Rule, state: State, **given) -> tuple[Tensor, State]:
    """`decode`, which must be the way of these tokens."""
    call = Call.of(**given, valid=None, write=None, reset=None)
    plan = planned(rule, state, call)
    assert way_of(rule, call, plan).name == "one token"
    return ordinary(decode)(rule, state, call, plan)


def check(problem: Problem) -> None:
    with torch.no_grad():
        state = begun(problem)
        kept = {n: x.clone() for n, x in state.tensors().items()}
        fast, after = one_by_one(decoded, problem, state)
        slow, _ = one_by_one(recurrence, problem, state)
        assert list(fast) == list(slow)  # states are stacked, compared and saved in this order
        same(fast, slow)
        same(fast, one_by_one(by_way(1), problem, state)[0])
        same(fast, one_by_one(scan, problem, state)[0], 0.0)
    same(state.tensors(), kept, 0.0)  # a state is a value
    assert all(x.is_contiguous() for x in after.A.values())


@pytest.mark.parametrize("rule", each(TAKEN))
def test_decoding_is_the_recurrence(rule):
    check(Problem(rule, seed=TAKEN.index(rule), T=2 + T))


@pytest.mark.parametrize("rule", (TITANS, *KEEPING), ids=name)
def test_gates_at_exactly_0_and_1(rule):
    problem = Problem(rule, seed=1000 + TAKEN.index(rule), T=2 + T)
    for gate in problem.gates.values():
        with torch.no_grad():
            draw = torch.rand(gate.shape, generator=torch.Generator().manual_seed(gate.numel()))
            gate[draw < 0.3] = 0.0
            gate[draw > 0.7] = 1.0
    check(problem)


def test_rows_are_what_they_are_alone():
    problem = Problem(TITANS, seed=1, T=2 + T)
    with torch.no_grad():
        together, _ = one_by_one(decoded, problem, begun(problem))
        for row in range(problem.B):
            alone = Problem(TITANS, seed=1, T=2 + T)
            alone.q, alone.k, alone.v = (x[[row]] for x in (problem.q, problem.k, problem.v))
            alone.gates = {n: g[[row]] for n, g in problem.gates.items()}
            same(
                one_by_one(decoded, alone, begun(problem).select([row]))[0],
                {n: x[[row]] for n, x in together.items()},
                1e-12,
            )


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("titans-mac", {"segment_size": 6, "num_persistent": 2}),
        ("titans-mac", {"segment_size": 6, "num_persistent": 0}),
        ("titans-mag", {"window_size": 5, "num_persistent": 2}),
        ("transformer", {}),
    ],
)
def test_sessions_side_by_side_decode_as_if_alone(preset, sizes):
    # Prompts that end anywhere in a chunk, a segment and a window; then over the ends of all three, a token a call.
    more = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 3}
    config = miras.preset(preset).changed(sizes | more)
    torch.manual_seed(0)
    model, lengths = miras.LM(config).double(), torch.tensor([1, 6, 8, 11])
    tokens = torch.randint(11, (4, 24))
    with torch.no_grad():
        _, state = model(tokens[:, :11], valid=torch.arange(11) < lengths[:, None])
        steps = []
        for t in range(13):
            logits, state = model(tokens.gather(1, lengths[:, None] + t), state)
            steps.append(logits)
        for row, length in enumerate(lengths.tolist()):
            whole, end = model(tokens[[row], : length + 13])
            same({"y": torch.cat(steps, 1)[[row]]}, {"y": whole[:, length:]})
            if preset != "transformer":  # whose cache is as long as the longest row's
                same(state.select([row]).tensors(), end.tensors())


def test_inference_mode_gives_ordinary_tensors():
    problem = Problem(TITANS, seed=2, T=2 + T)
    with torch.no_grad():
        state = begun(problem)
        expected, _ = one_by_one(decoded, problem, state)
    with torch.inference_mode():
        found, _ = one_by_one(decoded, problem, state.map(torch.clone))
    same(found, expected, 1e-12)
    assert not any(x.is_inference() for n, x in found.items() if n != "y")


@pytest.mark.parametrize(
    "change", ["gradients", "tokens", "observed", "valid", "memory", "steps", "retention"]
)
def test_what_is_left_to_others(change):
    rule = {
        "memory": Rule(GatedMLP(), chunk_size=5),
        "steps": Rule(MLP(), algorithm=GradientDescent(steps=2), chunk_size=5),
        "retention": Rule(MLP(), retention=ProximalElasticNet(0.1), chunk_size=5),
    }.get(change, TITANS)

    def way(rule: Rule, change: str) -> str:
        problem = Problem(rule, seed=5, T=2 + T, channels=False)
        tokens = 2 if change == "tokens" else 1
        masks = dict.fromkeys(("valid", "write", "reset"))
        if change == "valid":
            masks["valid"] = torch.ones(problem.B, 1, dtype=torch.bool)
        with torch.set_grad_enabled(change == "gradients"), observe(active=change == "observed"):
            state = init_state(rule, problem.start())
            call = Call.of(**piece(problem, slice(0, tokens)), **masks)
            return way_of(rule, call, planned(rule, state, call)).name

    assert way(rule, change) != "one token"
    assert way(TITANS, "nothing") == "one token"


def test_other_gradients_are_not_lost():
    problem = Problem(TITANS, seed=3, T=2 + T)
    y, _ = scan(TITANS, begun(problem), **piece(problem, slice(2, 3)))
    assert y.requires_grad


def test_wrong_arguments_are_refused():
    problem = Problem(TITANS, seed=4, T=2 + T)
    good = piece(problem, slice(0, 1))
    with torch.no_grad():
        state = begun(problem)
        for wrong in ({"k": good["k"][..., :-1]}, {"gates": {}}, {"v": good["v"][:1]}):
            with pytest.raises(ValueError, match="scan: "):
                scan(TITANS, state, **good | wrong)
