"""Feature maps: what they are, by hand, and where they are in a layer."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import miras
from miras.core.bias import Dot
from miras.core.memory import MLP, Matrix
from miras.core.retention import Keep
from miras.core.rule import Rule
from miras.nn.feature_map import FeatureMap, Identity, Polynomial
from miras.nn.gates import ALWAYS, Precise
from miras.nn.memory import Features, MemoryConfig, MemoryLayer
from miras.nn.part import Sizes
from miras.train.optimizer import parameter_groups
from miras.zoo import preset

SIZES = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1}


def vectors(n: int, width: int, heads: int = 2, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(1, heads, n, width, generator=g).double(), dim=-1)


def test_monomials_by_hand():
    phi = Polynomial(2).build(2, 1).double()
    assert phi.c.tolist() == [[1, 1, 0.5]]  # 1 / i!, whose length is 1.5
    root = math.sqrt(2)
    expected = torch.tensor([1, 3, 5, 0.5 * 9, 0.5 * root * 15, 0.5 * 25], dtype=torch.float64) / 1.5
    torch.testing.assert_close(phi(torch.tensor([[[[3.0, 5.0]]]]).double())[0, 0, 0], expected)
    names = [(i, j, k) for i in range(3) for j in range(i, 3) for k in range(j, 3)]
    phi, x = Polynomial(3).build(3, 1).double(), torch.tensor([2.0, 3.0, 5.0]).double()
    cubes = phi(x.view(1, 1, 1, 3))[0, 0, 0, -10:] * torch.tensor([1, 1, 0.5, 1 / 6]).norm() * 6
    orders = [6 // math.prod(math.factorial(each.count(i)) for i in range(3)) for each in names]
    by_hand = [math.prod(float(x[i]) for i in each) * n**0.5 for each, n in zip(names, orders, strict=True)]
    torch.testing.assert_close(cubes, torch.tensor(by_hand).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_their_product_is_a_polynomial_of_the_product(degree: int):
    choice = Polynomial(degree)
    phi = choice.build(5, 2).double()
    q, k = vectors(7, 5), vectors(7, 5, seed=1)
    torch.manual_seed(0)
    torch.testing.assert_close(phi(k).norm(dim=-1), torch.ones(1, 2, 7).double())
    with torch.no_grad():
        phi.c.normal_()
    power = phi.c.square() / phi.c.square().sum(-1, keepdim=True)
    together = (q * k * 3).sum(-1)
    expected = sum(power[:, i, None] * together**i for i in range(degree + 1))
    found = phi(q * 3), phi(k)
    assert {x.shape[-1] for x in found} == {choice.width(5)} == {math.comb(5 + degree, degree)}
    torch.testing.assert_close((found[0] * found[1]).sum(-1), expected)
    steps = torch.stack([q, k], 3)  # several keys of one token
    assert torch.equal(phi(steps)[:, :, :, 1], phi(k))
    x = vectors(2, 3, 1).requires_grad_()
    assert torch.autograd.gradgradcheck(choice.build(3, 1).double(), (x,))


def test_a_linear_memory_holds_more_pairs_than_its_keys_are_wide():
    keys = vectors(15, 4, 1)
    assert torch.linalg.matrix_rank(keys[0, 0]) == 4
    # 15 features, of which keys of length 1 tie one to the others: the sum of their squares is the constant.
    assert torch.linalg.matrix_rank(Polynomial(2).build(4, 1).double()(keys)[0, 0]) == 14


def test_the_map_comes_last_before_the_memory():
    """Linear attention with a polynomial kernel, rotated keys of length 1, scaled queries: written as attention."""
    rule, dim, T = Rule(Matrix(), Dot(), Keep(), chunk_size=1), 4, 11
    torch.manual_seed(0)
    layer = MemoryLayer(
        16,
        2,
        rule,
        gates={"lr": ALWAYS},
        conv_size=0,
        initial_scale=0.0,
        key_dim=dim,
        features=Features(values="identity", scaled=True, rotary=True),
        feature_map=Polynomial(2),
    ).double()
    reader, x = layer.reader, torch.randn(1, T, 16, dtype=torch.float64)
    with torch.no_grad():
        reader.phi.c.copy_(torch.tensor([[0.3, 0.5, 0.7], [0.9, -0.2, 0.1]]))
        read = reader(x)[0][0].view(T, 2, 8)
        q, k = (
            torch.nn.functional.silu(x[0] @ part.proj.weight.T).view(T, 2, dim)
            for part in (reader.q, reader.k)
        )
        turns = torch.tensor([1j, 0.01j], dtype=torch.complex128).exp()  # of one token
        q, k = (torch.complex(z[..., :2], z[..., 2:]) / z.norm(dim=-1, keepdim=True) for z in (q, k))
        v = (x[0] @ reader.v.proj.weight.T).view(T, 2, 8)
        for h in range(2):
            power = reader.phi.c[h].square() / reader.phi.c[h].square().sum()
            for t in range(T):
                expected = torch.zeros(8).double()
                for s in range(t + 1):
                    together = (q[t, h] * turns ** (t - s) * k[s, h].conj()).real.sum() / math.sqrt(dim)
                    expected += sum(power[i] * together**i for i in range(3)) * v[s, h]
                torch.testing.assert_close(read[t, h], expected)


def test_its_parameters_are_the_layers():
    model = miras.LM(preset("deltanet", key_dim=4, feature_map=Polynomial(), **SIZES))
    phi = model.model.layers[0].mixer.reader.phi
    assert isinstance(phi, Precise) and model.to(torch.bfloat16) and phi.c.dtype == torch.float32
    assert not [n for n in model.state_dict() if "phi" in n and not n.endswith("phi.c")]
    held = next(
        group for group in parameter_groups(model, 1, 1, 1) if any(p is phi.c for p in group["params"])
    )
    assert held["weight_decay"] == 0
    with torch.no_grad():
        expected = phi(vectors(3, 4).float())
        phi.to_empty(device="cpu")
        for x in phi.buffers():
            x.fill_(0)
        phi.reset_fixed()
        phi.c.copy_(torch.tensor([1.0, 1.0, 0.5]).expand(2, 3))
    torch.testing.assert_close(phi(vectors(3, 4).float()), expected)


@dataclass(frozen=True)
class BothSigns(FeatureMap):
    """phi(x) = [relu(x), relu(-x)]."""

    def width(self, key_dim: int) -> int:
        return 2 * key_dim

    def build(self, key_dim: int, num_heads: int) -> nn.Module:
        return Halves()


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), (-x).relu()], -1)


def test_a_map_of_ones_own_is_named_by_its_import_path():
    config = preset("deltanet", key_dim=4, feature_map=BothSigns(), **SIZES)
    written = json.loads(json.dumps(config.to_dict()))
    assert written["pattern"][0]["feature_map"] == {"name": f"{__name__}:BothSigns"}
    with pytest.raises(ValueError, match="names code to import and run"):
        miras.ModelConfig.from_dict(written)
    assert miras.ModelConfig.from_dict(written, trust_remote_code=True) == config
    model = miras.LM(config)
    assert model.model.layers[0].mixer.reader.A0.w.shape == (2, 8, 8)
    assert model(torch.zeros(1, 9, dtype=torch.long))[0].isfinite().all()


def test_what_has_no_meaning():
    for name, changed, message in (
        (
            "deltanet",
            {"feature_map": "polynomial"},
            "feature_map must be a FeatureMap, such as Polynomial(), got",
        ),
        ("hgrn2", {"feature_map": Polynomial()}, "keys='forget' takes those of the memory; use Identity()"),
        ("titans-lmm", {"feature_map": Polynomial()}, "needs equal key and value widths, got 45 and 8"),
        (
            "deltanet",
            {"feature_map": Polynomial(12), "key_dim": 64},
            "more than a tensor can be; give a smaller",
        ),
    ):
        with pytest.raises(ValueError) as raised:
            preset(name, **SIZES | changed)
        assert message in str(raised.value)
    with pytest.raises(ValueError, match="Polynomial: degree must be at least 1, got 0"):
        Polynomial(0)
    # Widths that fit behind the map do.
    fits = MemoryConfig(rule=Rule(MLP()), key_dim=2, value_dim=6, feature_map=Polynomial())
    assert fits.refusal(Sizes(hidden_size=16, num_heads=2)) is None
    assert MemoryConfig(feature_map=Identity()) == MemoryConfig()
