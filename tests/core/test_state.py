"""States are values: kept, moved, forked, stacked, written down and filled again."""

from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from miras.core.algorithm import GradientDescent
from miras.core.memory import MLP
from miras.core.retention import Decay
from miras.core.rule import Rule, State, init_state
from miras.core.state import Record, choose
from miras.engine import scan

H, D = 2, 4
RULE = Rule(
    MLP(expansion=2), retention=Decay(decayed=True), algorithm=GradientDescent(True, 1.0), chunk_size=5
)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(rows, seed=0):
    shapes = RULE.memory.shapes(D, D).items()
    return init_state(RULE, {n: randn(seed + i, rows, H, *s).div(2) for i, (n, s) in enumerate(shapes)})


def tokens(rows, T, seed):
    q, k, v = (randn(seed + i, rows, H, T, D) for i in range(3))
    g = torch.Generator().manual_seed(seed)
    gates = {n: torch.rand(rows, H, T, generator=g, dtype=torch.float64) * 0.6 for n in RULE.gates()}
    return q, normalize(k, dim=-1), v, gates


def rows_of(parts, rows):
    return *(x[rows] for x in parts[:3]), {n: g[rows] for n, g in parts[3].items()}


def equal(a, b, tolerance=0.0):
    a, b = a.tensors(), b.tensors()
    assert list(a) == list(b)
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=0, atol=tolerance, msg=n)


@dataclass(frozen=True)
class Nested(Record):
    parts: tuple[State, ...]
    tails: dict[str, Tensor]
    note: str = "kept"


def nested(rows=3):
    memory = scan(RULE, fresh(rows), *tokens(rows, 7, 1))[1]
    return Nested((memory, fresh(rows, 9)), {"q": randn(2, rows, 3), "k": torch.arange(rows)})


def test_every_tensor_has_a_path_in_a_fixed_order():
    names = list(nested().tensors())
    memory = [f"{part}.w{i}" for part in ("A", "S", "anchor") for i in (1, 2)]
    memory += ["phase", "retained.w1", "retained.w2", "recent.key", "recent.w1", "recent.w2"]
    assert names == [f"parts.{i}.{n}" for i in (0, 1) for n in memory] + ["tails.q", "tails.k"]


def test_with_tensors_fills_the_same_structure():
    record = nested()
    twin = record.with_tensors({n: x.clone() for n, x in record.tensors().items()})
    assert isinstance(twin, Nested) and isinstance(twin.parts[0], State) and twin.note == "kept"
    equal(twin, record)
    blank = record.with_tensors({n: torch.zeros_like(x) for n, x in record.tensors().items()})
    assert not any(x.any() for x in blank.tensors().values())
    assert record.parts[0].A["w1"].any()
    with pytest.raises(KeyError, match=r"parts\.0\.A\.w1"):
        record.with_tensors({})


def test_records_are_frozen():
    with pytest.raises(FrozenInstanceError):
        fresh(1).phase = torch.ones(1)


def test_detach_cuts_history_and_keeps_numbers():
    record = fresh(2)
    for a in record.A.values():
        a.requires_grad_()
    _, state = scan(RULE, record, *tokens(2, 7, 0))
    assert state.A["w1"].requires_grad and state.recent["key"].grad_fn is None
    cut = state.detach()
    equal(cut, state)
    assert not any(x.requires_grad for x in cut.tensors().values())
    assert state.A["w1"].requires_grad


def test_to_moves_every_tensor():
    moved = nested().to("meta")
    assert {x.device.type for x in moved.tensors().values()} == {"meta"}
    equal(nested().to(torch.device("cpu")), nested())


def test_nbytes_counts_every_tensor():
    record = nested(3)
    numbers = sum(x.numel() for x in record.tensors().values())  # all of 8 bytes: float64 and int64
    assert record.nbytes() == 8 * numbers
    memory = H * (4 * 2 * D * 2 * D + 5 * D + 2 * 5) + 1  # A, S, anchor, retained; keys, steps; phase
    assert fresh(1).nbytes() == 8 * memory


@pytest.mark.parametrize("rows", [[2, 0], (1,), [1, 1, 1], torch.tensor([0, 2])])
def test_select_takes_rows_in_the_order_given(rows):
    record = nested()
    chosen = record.select(rows)
    for name, x in chosen.tensors().items():
        assert torch.equal(x, record.tensors()[name][torch.as_tensor(rows)]), name


def test_a_fork_goes_on_independently():
    _, state = scan(RULE, fresh(2), *tokens(2, 8, 3))  # in mid-chunk
    fork = state.select([1, 1])
    more = tokens(2, 9, 4)
    _, after = scan(RULE, fork, *more)
    for b in (0, 1):
        _, alone = scan(RULE, state.select([1]), *rows_of(more, slice(b, b + 1)))
        equal(after.select([b]), alone, 1e-12)
    assert (after.A["w1"][0] - after.A["w1"][1]).abs().max() > 1e-3
    equal(state, scan(RULE, fresh(2), *tokens(2, 8, 3))[1])  # a value is not changed by its use


@pytest.mark.parametrize("read", [(0, 3), (3, 7), (5, 4)])
def test_streams_at_different_phases_go_on_together_as_alone(read):
    states = [scan(RULE, fresh(1, s), *tokens(1, n, s))[1] if n else fresh(1, s) for s, n in enumerate(read)]
    assert [int(s.phase) for s in states] == [n % 5 for n in read]
    both = State.stack(states)
    assert isinstance(both, State) and both.phase.tolist() == [n % 5 for n in read]
    for b in (0, 1):
        equal(both.select([b]), states[b])
    for T in (1, 4, 11):
        more = tokens(2, T, 8)
        y, after = scan(RULE, both, *more)
        for b in (0, 1):
            y_alone, alone = scan(RULE, states[b], *rows_of(more, slice(b, b + 1)))
            torch.testing.assert_close(y[b : b + 1], y_alone, rtol=0, atol=1e-12)
            equal(after.select([b]), alone, 1e-12)


def test_choose_takes_whole_rows():
    yes, no, rows = nested(), nested().map(torch.zeros_like), torch.tensor([True, False, True])
    mixed = choose(rows, yes, no)
    for b, source in enumerate((yes, no, yes)):
        equal(mixed.select([b]), source.select([b]))
