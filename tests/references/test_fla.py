"""`miras.scan` against the plain PyTorch references of flash-linear-attention (fla-core).

Each runs on a CPU from its own file: `fla.ops` as a package cannot be imported without Triton. All compute in fp32,
whatever they are given, and `miras` here in fp64, so a difference is their rounding. They share conventions that are
easy to get wrong: decays are natural logarithms, q is multiplied by d_key^-1/2 unless `scale` is given and sometimes
always, and some take (B, H, T, D), others (B, T, H, D).

Not compared, since it is wrong: `chunk_momentum_delta_rule_ref` loses all digits unless momentum is near 1 (it takes
out the product of a chunk's momentum as a factor); `titans_linear` and `chunk_titans_linear` leave a part of the
gradient of their layer norm undivided, so they agree with each other and not with autograd. Of Titans only the
coefficients are compared.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from miras.core.algorithm import GradientDescent
from miras.core.bias import L2
from miras.core.memory import Matrix
from miras.core.retention import Decay
from miras.core.rule import Rule, init_state
from miras.engine import scan
from miras.nn.gates import LINKS
from miras.zoo import preset

Tree = dict[str, Tensor]
OUTPUT, GRADIENT = 3e-6, 3e-5


def naive(path: str) -> ModuleType:
    """A reference's own file, `path` below fla/ops, without the package around it."""
    package = importlib.util.find_spec("fla")
    if package is None or package.origin is None:
        pytest.skip("needs fla-core: pip install 'miras-torch[references]'")
    file = Path(package.origin).parent / "ops" / path
    spec = importlib.util.spec_from_file_location(f"fla_{file.parent.name}_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def through(rule: Rule, q: Tensor, k: Tensor, v: Tensor, gates: Tree, A: Tensor) -> Tree:
    """Reads and last accumulator, all (B, H, ...)."""
    y, state = scan(rule, init_state(rule, {"w": A}), q, k, v, gates)
    return {"y": y, "A": state.A["w"]}


def time_first(x: Tensor) -> Tensor:
    """(B, H, T, ...) as (B, T, H, ...), and back."""
    return x.transpose(1, 2)


def both(
    draw: Any, agree: Any, name: str, reference: str, ours: Callable[[], Tree], theirs: Callable[[], Tree]
):
    """Outputs and last states agree, and so do the gradients of everything that was drawn."""
    results = {"ours": ours(), "theirs": theirs()}
    agree(name, reference, results["ours"], results["theirs"], OUTPUT)
    weights = {n: torch.linspace(-1, 1, x.numel()).double().view(x.shape) for n, x in results["ours"].items()}
    grads = {
        who: torch.autograd.grad(sum((weights[n] * x).sum() for n, x in tree.items()), draw.leaves)
        for who, tree in results.items()
    }
    trees = [{str(i): g for i, g in enumerate(grads[who])} for who in results]
    agree(f"{name}, gradients", reference, *trees, GRADIENT)


def test_linear_attention(draw, agree):
    q, k, v, A = draw.tokens(draw.DK), draw.tokens(draw.DK), draw.tokens(draw.DV), draw.normal(2, 3, 8, 6)
    run = naive("linear_attn/naive.py").naive_recurrent_linear_attn

    def theirs() -> Tree:
        y, S = run(*map(time_first, (q, k, v)), scale=1.0, initial_state=A.float(), output_final_state=True)
        return {"y": time_first(y), "A": S}

    rule, lr = preset("linear-attention").memories()[0].rule, torch.ones(2, 3, draw.T).double()
    both(
        draw,
        agree,
        "linear-attention",
        "naive_recurrent_linear_attn",
        lambda: through(rule, q, k, v, {"lr": lr}, A),
        theirs,
    )


def test_retnet(draw, agree):
    """The decay of every head is the reference's own: 1 - 2^(-5 - h), as the preset's fixed gate has it."""
    q, k, v = draw.tokens(draw.DK), draw.tokens(draw.DK), draw.tokens(draw.DV)
    config = preset("retnet")
    gate = config.memories()[0].gates["forget"]
    forget = LINKS[gate.link](torch.tensor(gate.first(draw.H)).double())
    gates = {"lr": torch.ones(2, 3, draw.T).double(), "forget": forget[:, None].expand(2, 3, draw.T)}
    zero = torch.zeros(2, 3, draw.DK, draw.DV).double()
    run = naive("retention/naive.py").naive_retention
    both(
        draw,
        agree,
        "retnet",
        "naive_retention",
        lambda: {"y": through(config.memories()[0].rule, q * draw.DK**-0.5, k, v, gates, zero)["y"]},
        lambda: {"y": run(q, k, v)},
    )


@pytest.mark.parametrize("form", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
def test_mamba2(draw, agree, form):
    """Its scan with the time step in the values: q = C, k = B, lr = dt. The step and the decay are drawn freely."""
    q, k, v, A = draw.tokens(draw.DK), draw.tokens(draw.DK), draw.tokens(draw.DV), draw.normal(2, 3, 8, 6)
    lr, forget = draw.gate(), draw.gate()
    run = getattr(naive("simple_gla/naive.py"), form)

    def theirs() -> Tree:
        given = map(time_first, (q, k, v * lr[..., None], (1 - forget).log()))
        y, S = run(*given, scale=1.0, initial_state=A.float(), output_final_state=True)
        return {"y": time_first(y), "A": S}

    rule = preset("mamba2").memories()[0].rule
    both(
        draw,
        agree,
        "mamba2",
        form,
        lambda: through(rule, q, k, v, {"lr": lr, "forget": forget}, A),
        theirs,
    )


@pytest.mark.parametrize("name", ["gla", "hgrn2"])
def test_decay_by_key_channel(draw, agree, name):
    """HGRN2 is GLA whose key is 1 - keep; fla's own layer calls the same kernel with that key."""
    q, v, A = draw.tokens(draw.DK), draw.tokens(draw.DV), draw.normal(2, 3, 8, 6)
    forget = draw.gate(draw.DK)
    k = forget if name == "hgrn2" else draw.tokens(draw.DK)
    run = naive("gla/naive.py").naive_recurrent_gla

    def theirs() -> Tree:
        y, S = run(
            *map(time_first, (q, k, v, (1 - forget).log())), initial_state=A.float(), output_final_state=True
        )
        return {"y": time_first(y), "A": S}

    rule, lr = preset(name).memories()[0].rule, torch.ones(2, 3, draw.T).double()
    gates = {"lr": lr, "forget": forget[..., None]}
    both(
        draw,
        agree,
        name,
        "naive_recurrent_gla",
        lambda: through(rule, q * draw.DK**-0.5, k, v, gates, A),
        theirs,
    )


@pytest.mark.parametrize("name", ["deltanet", "longhorn"])
def test_delta_rule(draw, agree, name):
    """Longhorn has no reference of its own: it is the delta rule with the step lr / (1 + lr |k|^2)."""
    q, v, A = draw.tokens(draw.DK), draw.tokens(draw.DV), draw.normal(2, 3, 8, 6)
    k, lr = (
        (draw.keys(draw.DK), draw.gate()) if name == "deltanet" else (draw.tokens(draw.DK), draw.gate(high=2))
    )
    run = naive("delta_rule/naive.py").delta_rule_recurrence

    def theirs() -> Tree:
        beta = lr if name == "deltanet" else lr / (1 + lr * k.square().sum(-1))
        return dict(zip(("y", "A"), run(q, k, v, beta, initial_state=A.float()), strict=True))

    both(
        draw,
        agree,
        name,
        "delta_rule_recurrence",
        lambda: through(preset(name).memories()[0].rule, q * draw.DK**-0.5, k, v, {"lr": lr}, A),
        theirs,
    )


def test_gated_deltanet(draw, agree):
    q, k, v, A = draw.tokens(draw.DK), draw.keys(draw.DK), draw.tokens(draw.DV), draw.normal(2, 3, 8, 6)
    lr, forget = draw.gate(), draw.gate(high=0.5)
    run = naive("gated_delta_rule/naive.py").naive_recurrent_gated_delta_rule

    def theirs() -> Tree:
        given = map(time_first, (q, k, v, lr, (1 - forget).log()))
        y, S = run(*given, scale=1.0, initial_state=A.float(), output_final_state=True)
        return {"y": time_first(y), "A": S}

    rule = preset("gated-deltanet").memories()[0].rule
    both(
        draw,
        agree,
        "gated-deltanet",
        "naive_recurrent_gated_delta_rule",
        lambda: through(rule, q, k, v, {"lr": lr, "forget": forget}, A),
        theirs,
    )


def test_gated_deltanet_by_key_channel(draw, agree):
    """Kimi Delta Attention: no preset, the rule of gated-deltanet with `forget` by input channel."""
    q, k, v, A = draw.tokens(draw.DK), draw.keys(draw.DK), draw.tokens(draw.DV), draw.normal(2, 3, 8, 6)
    lr, forget = draw.gate(), draw.gate(draw.DK, high=0.5)
    run = naive("kda/naive.py").naive_recurrent_kda

    def theirs() -> Tree:
        given = map(time_first, (q, k, v, (1 - forget).log(), lr))
        y, S = run(*given, scale=1.0, initial_state=A.float(), output_final_state=True)
        return {"y": time_first(y), "A": S}

    rule, gates = preset("gated-deltanet").memories()[0].rule, {"lr": lr, "forget": forget[..., None]}
    both(
        draw,
        agree,
        "gated-deltanet by key channel",
        "naive_recurrent_kda",
        lambda: through(rule, q, k, v, gates, A),
        theirs,
    )


def test_deltaproduct(draw, agree):
    """Two steps per token, each of up to 2."""
    q, k, v = draw.tokens(draw.DK), draw.keys(2, draw.DK), draw.tokens(2, draw.DV)
    lr, forget, A = draw.gate(2, high=2), draw.gate(high=0.5), draw.normal(2, 3, 8, 6)
    run = naive("gated_delta_product/naive.py").naive_recurrent_gated_delta_product

    def theirs() -> Tree:
        steps = (time_first(x.flatten(2, 3)) for x in (k, v))
        g, beta = time_first((1 - forget).log()), time_first(lr.flatten(2, 3))
        y, S = run(
            time_first(q),
            *steps,
            g,
            beta,
            1.0,
            initial_state=A.float(),
            output_final_state=True,
            num_householder=2,
        )
        return {"y": time_first(y), "A": S}

    rule = preset("deltaproduct").memories()[0].rule
    both(
        draw,
        agree,
        "deltaproduct",
        "naive_recurrent_gated_delta_product",
        lambda: through(rule, q, k, v, {"lr": lr, "forget": forget}, A),
        theirs,
    )


@pytest.mark.parametrize("decayed", [False, True])
def test_linear_titans_of_one_token(draw, agree, decayed):
    """Momentum DeltaNet is Titans' memory with one matrix and chunks of one token; its M is -S.

    `p` is what the prediction is made with: k at the undecayed memory (Titans), (1 - forget) k at the decayed one.
    """
    q, k, v, A = draw.tokens(draw.DK), draw.keys(draw.DK), draw.tokens(draw.DV), draw.normal(2, 3, 8, 6)
    lr, momentum, forget = draw.gate(high=0.3), draw.gate(), draw.gate(high=0.5)
    run = naive("momentum_delta_rule/naive.py").recurrent_momentum_delta_rule_ref
    rule = Rule(Matrix(), L2(), Decay(decayed), GradientDescent(momentum=True), chunk_size=1)

    def ours() -> Tree:
        gates = {"lr": lr, "momentum": momentum, "forget": forget}
        y, state = scan(rule, init_state(rule, {"w": A}), q, k, v, gates)
        return {"y": y, "A": state.A["w"], "S": state.S["w"]}

    def theirs() -> Tree:
        p = (1 - forget)[..., None] * k if decayed else k
        logs = ((1 - forget).log(), momentum.log())
        given = [time_first(x) for x in (q, k, v, *logs, p, torch.ones_like(lr), lr)]
        y, last = run(*given, scale=1.0, initial_S=A.float(), output_final_state=True)
        return {"y": time_first(y), "A": last[0], "S": -last[1]}

    name = f"titans-linear, chunk of 1{', decayed' * decayed}"
    both(draw, agree, name, "recurrent_momentum_delta_rule_ref", ours, theirs)


def test_coefficients_of_chunked_titans(draw, agree):
    """Reads of one chunk from the reference's coefficients: beta q A0 + f q S0 - sum_j G_ij (q . k_j) u_j.

    u_j is the gradient at the chunk's start. fla's own u_j is wrong, see above, so it is made here, for L2.
    """
    C = 16
    rule = Rule(Matrix(), L2(), Decay(), GradientDescent(momentum=True), C)
    q, k, v = (x[:, :, :C] for x in (draw.tokens(draw.DK), draw.keys(draw.DK), draw.tokens(draw.DV)))
    lr, momentum, forget = (draw.gate()[:, :, :C] for _ in range(3))
    A, S = draw.normal(2, 3, 8, 6), draw.normal(2, 3, 8, 6)
    begun = init_state(rule, {"w": A})
    begun = type(begun)(begun.A, {"w": S}, begun.anchor, begun.phase, begun.retained, begun.recent)
    y, last = scan(rule, begun, q, k, v, {"lr": lr, "momentum": momentum, "forget": forget})

    beta, beta_T, f, f_T, g, G, m_T, n_T = naive("titans/log_impl.py").combine_params_log(
        lr[..., None], forget[..., None], momentum[..., None], C
    )
    u = k @ A - v
    read = beta[..., None] * (q @ A) + f[..., None] * (q @ S) - (q @ k.mT * G) @ u
    ends = {
        "A": beta_T[..., None, None] * A + f_T[..., None, None] * S - k.mT @ (g[..., None] * u),
        "S": m_T[..., None, None] * S - k.mT @ (n_T[..., None] * u),
    }
    ours = {"y": y, "A": last.A["w"], "S": last.S["w"]}
    agree("titans-linear, chunk of 16", "combine_params_log", ours, {"y": read} | ends, OUTPUT)


def test_ttt_linear(draw, agree):
    """fla's rates are of the token that reads, the paper's of the one that writes: equal in a chunk of one rate.

    It reads z + LN(z) with z = q W + b, the paper q + LN(z): reads are made here from our states, token by token.
    """
    D, T, C = draw.DK, 48, 16
    rule = preset("ttt-linear", algorithm=GradientDescent()).memories()[0].rule
    q, k, v = (draw.tokens(D)[:, :, :T] for _ in range(3))
    lr = draw.gate(high=0.2)[:, :, :T:C].repeat_interleave(C, 2)
    A = {"w1": draw.normal(2, 3, D, D, scale=0.5), "b1": draw.normal(2, 3, 1, D)}
    outer = {"gain": draw.normal(3, D), "shift": draw.normal(3, D)}
    run = naive("ttt/naive.py").chunk_ttt_linear_ref

    state, reads = init_state(rule, A), []
    for t in range(T):
        now = slice(t, t + 1)
        _, state = scan(
            rule, state, q[:, :, now], k[:, :, now], v[:, :, now], {"lr": lr[:, :, now]}, outer=outer
        )
        z = q[:, :, now] @ state.A["w1"] + state.A["b1"]
        normed = torch.nn.functional.layer_norm(z, (D,), eps=1e-5)
        reads.append(z + normed * outer["gain"][:, None] + outer["shift"][:, None])

    given = [time_first(x) for x in (q, k, v)]
    y, W, b = run(
        *(x.detach().clone() for x in given),
        *(outer[n].detach() for n in ("gain", "shift")),
        time_first(lr[..., None]).detach(),
        scale=1.0,
        eps=1e-5,
        mini_batch_size=C,
        initial_state=A["w1"].detach().float(),
        initial_state_bias=A["b1"].detach().float(),
        output_final_state=True,
    )
    ours = {"y": torch.cat(reads, 2), "W": state.A["w1"], "b": state.A["b1"]}
    agree("ttt-linear", "chunk_ttt_linear_ref", ours, {"y": time_first(y), "W": W, "b": b}, 2e-5)
