"""Written-out backward passes against finite differences, once, twice, and against recorded operations."""

from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from miras.core.activation import gelu, layer_norm
from miras.core.algorithm import GradientDescent
from miras.core.memory import MLP, Matrix, Memory
from miras.core.rule import Rule, init_state
from miras.engine import chunks as module
from miras.engine import scan
from miras.engine.kernels import advance, fast_advance, fast_read, read
from miras.engine.tables import products
from miras.nn.norm import unit


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def inputs(of: str, d_in: int, d_out: int, momentum: bool, n: int = 3) -> list[Tensor]:
    """What a read or an advance takes, for 2 rows of 2 heads."""
    R, weight, m = 4, (2, 2, d_in, d_out), n if of == "read" else 1
    taken = [random(R, n, d_in)] * (of == "read") + [random(R, n, d_in), random(R, n, d_out)]
    taken += [random(R, n, n if of == "read" else 1)]
    for _ in range(1 + momentum):
        taken += [random(R, m, 1), random(*weight)]
    return taken


BOTH = {"read": (read, fast_read), "advance": (advance, fast_advance)}


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize(("d_in", "d_out"), [(2, 3), (3, 2), (2, 2)])
@pytest.mark.parametrize("of", BOTH)
def test_reading_and_advancing(of: str, d_in: int, d_out: int, momentum: bool) -> None:
    torch.manual_seed(0)
    taken, (slow, fast) = inputs(of, d_in, d_out, momentum), BOTH[of]
    with torch.no_grad():
        silent = fast(*taken)
    assert torch.allclose(slow(*taken), fast(*taken), atol=1e-12) and torch.equal(fast(*taken), silent)
    assert gradcheck(fast, taken) and gradgradcheck(fast, taken)


@pytest.mark.parametrize("of", BOTH)
def test_a_step_keeps_no_gelu_and_no_gradient_of_one(of: str) -> None:
    torch.manual_seed(2)
    *_, keys, _, rest0, rest1, rest2 = inputs(of, 2, 4, momentum=False)
    before, after = random(4, 3, 2), random(4, 3, 4)
    kept: list[Tensor] = []

    def run(before: Tensor, after: Tensor, keys: Tensor, *rest: Tensor) -> Tensor:
        d = torch.autograd.grad(gelu(after).sin().sum(), after, create_graph=True)[0]
        x = gelu(before)
        asked = [x] if of == "read" else []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            return BOTH[of][1](*asked, keys if of == "read" else x, d, *rest)

    taken = (before, after, keys, rest0, rest1, rest2)
    assert gradcheck(run, taken) and gradgradcheck(run, taken)
    kept.clear()
    run(*taken)
    made = [gelu(before), torch.autograd.grad(gelu(after).sin().sum(), after)[0]]
    assert any(torch.equal(before, t) for t in kept)
    assert not any(torch.equal(x, t) for x in made for t in kept)


def test_products_are_exact_at_zero_and_one() -> None:
    torch.manual_seed(3)
    a = torch.rand(2, 5, dtype=torch.float64)
    a[0, 2], a[1, 1], a[1, 3] = 0, 1, 0
    a.requires_grad_()
    first, table = products(a)
    for t in range(5):
        assert torch.equal(first[:, t], a[:, : t + 1].prod(-1))
        for i in range(5):
            want = a[:, i + 1 : t + 1].prod(-1) if i <= t else torch.zeros(2, dtype=torch.float64)
            assert torch.equal(table[:, t, i], want)
    assert gradcheck(products, (a,)) and gradgradcheck(products, (a,))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gelu, F.gelu),
        (layer_norm, lambda x: F.layer_norm(x, x.shape[-1:])),
        (unit, lambda x: F.normalize(x, dim=-1)),
    ],
)
def test_activations(ours, theirs) -> None:
    torch.manual_seed(4)
    x = random(2, 3, 7)
    assert torch.allclose(ours(x), theirs(x), atol=1e-14)
    assert gradcheck(ours, (x,)) and gradgradcheck(ours, (x,))

    def slope(x: Tensor) -> Tensor:  # differentiated twice more: what an outer second derivative needs
        return torch.autograd.grad(ours(x).sin().sum(), x, create_graph=True)[0]

    assert gradgradcheck(slope, (x,))


def test_a_backward_pass_twice_gives_the_same_numbers() -> None:
    torch.manual_seed(5)
    x = torch.randn(3, 40, requires_grad=True)
    slope = torch.autograd.grad(gelu(x).sin().sum(), x, create_graph=True)[0]
    twice = [torch.autograd.grad(slope.square().sum(), x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)


class Held:
    """A tensor that a graph holds for its backward pass."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("memory", [Matrix(), MLP(), MLP(depth=3)], ids=repr)
def test_what_chunks_keep_is_about_what_is_reckoned(memory: Memory, momentum: bool, monkeypatch) -> None:
    chunks, width, heads, n = 6, 16, 2, 32
    rule = Rule(memory, algorithm=GradientDescent(momentum), chunk_size=n)
    leaf = lambda *shape: torch.rand(*shape, requires_grad=True)  # noqa: E731
    state = init_state(rule, {m: leaf(1, heads, *s) for m, s in memory.shapes(width, width).items()})
    q, k, v = (leaf(1, heads, chunks * n, width) for _ in range(3))
    gates = {name: leaf(1, heads, chunks * n) for name in rule.gates()}
    reckon, reckoned = module._activation_bytes, list[int]()
    monkeypatch.setattr(module, "_activation_bytes", lambda *a: reckoned.append(reckon(*a)) or reckoned[-1])
    alive: WeakSet[Held] = WeakSet()

    def hold(x: Tensor) -> Held:
        alive.add(held := Held(x))
        return held

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda held: held.x):
        after = scan(rule, state, q, k, v, gates)
    parts = [held.x.untyped_storage() for held in alive]
    kept = sum({part.data_ptr(): part.nbytes() for part in parts}.values())
    assert after and 0.6 < chunks * reckoned[0] / kept < 1.6
