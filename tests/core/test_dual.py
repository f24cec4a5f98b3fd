"""Written-out backward passes against finite differences, once, twice, and against recorded operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from miras.core.activation import gelu, layer_norm
from miras.core.dual import advance, fast_advance, fast_read, products, read
from miras.nn.norm import unit


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("d_in", "d_out"), [(2, 3), (3, 2), (2, 2)])
def test_reading_and_advancing(d_in: int, d_out: int, parts: int) -> None:
    torch.manual_seed(0)
    B, H, n, a, b = 2, 2, 3, min(d_in, d_out), max(d_in, d_out)
    x, keys, d, held = (
        random(B, H, n, d_in),
        random(B, H, n, d_in),
        random(B, H, n, d_out),
        random(B, H, parts * a, b),
    )
    first, table, last = random(B, H, n, parts), random(B, H, n, n), random(B, H, n, parts)
    carry = random(B, H, parts, parts)

    asked = (x, keys, d, held, first, table)
    assert torch.allclose(read(*asked), fast_read(*asked), atol=1e-12)
    assert gradcheck(fast_read, asked) and gradgradcheck(fast_read, asked)

    moved = (x, d, held, carry, last)
    for slow, fast in zip(advance(*moved), fast_advance(*moved), strict=True):
        assert torch.allclose(slow, fast, atol=1e-12)
    assert gradcheck(fast_advance, moved) and gradgradcheck(fast_advance, moved)


@pytest.mark.parametrize("chosen", [0, 1])
def test_advancing_when_one_result_is_unused(chosen: int) -> None:
    torch.manual_seed(1)
    moved = random(1, 1, 3, 2), random(1, 1, 3, 4), random(1, 1, 4, 4), random(1, 1, 2, 2), random(1, 1, 3, 2)
    slow, fast = (torch.autograd.grad(f(*moved)[chosen].sum(), moved) for f in (advance, fast_advance))
    for a, b in zip(slow, fast, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_products_are_exact_at_zero_and_one() -> None:
    torch.manual_seed(2)
    a = torch.rand(2, 5, dtype=torch.float64)
    a[0, 2], a[1, 1], a[1, 3] = 0, 1, 0
    a.requires_grad_()
    table = products(a)
    for t in range(5):
        for i in range(6):
            want = a[:, i : t + 1].prod(-1) if i <= t + 1 else torch.zeros(2, dtype=torch.float64)
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
    torch.manual_seed(3)
    x = random(2, 3, 7)
    assert torch.allclose(ours(x), theirs(x), atol=1e-14)
    assert gradcheck(ours, (x,)) and gradgradcheck(ours, (x,))

    def slope(x: Tensor) -> Tensor:  # differentiated twice more: what an outer second derivative needs
        return torch.autograd.grad(ours(x).sin().sum(), x, create_graph=True)[0]

    assert gradgradcheck(slope, (x,))
