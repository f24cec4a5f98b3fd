"""`miras.scan` against the PyTorch paths of transformers, which need no other package.

With flash-linear-attention beside them, transformers hands the calls on to it: the undecorated functions are taken.
They compute in fp32, `miras` here in fp64.
"""

import inspect

import pytest
import torch
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.xlstm import modeling_xlstm

from miras.core.rule import init_state
from miras.engine import scan
from miras.zoo import preset

TOLERANCE = 3e-6


@pytest.mark.parametrize("form", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_gated_deltanet(draw, agree, form):
    """Qwen3-Next's: q is always multiplied by d_key^-1/2, k is of length 1 here already."""
    q, k, v, A = draw.tokens(draw.DK), draw.keys(draw.DK), draw.tokens(draw.DV), draw.normal(2, 3, 8, 6)
    lr, forget = draw.gate(), draw.gate(high=0.5)
    rule = preset("gated-deltanet").memories()[0].rule
    y, state = scan(rule, init_state(rule, {"w": A}), q * draw.DK**-0.5, k, v, {"lr": lr, "forget": forget})
    given = (x.float().transpose(1, 2) for x in (q, k, v, (1 - forget).log(), lr))
    run = inspect.unwrap(getattr(modeling_qwen3_next, form))
    theirs, last = run(*given, initial_state=A.float(), output_final_state=True)
    found = {"y": y, "A": state.A["w"]}
    agree("gated-deltanet", form, found, {"y": theirs.transpose(1, 2), "A": last}, TOLERANCE)


def test_gated_deltanet_by_key_channel(draw, agree):
    """Kimi Linear's: the rule of gated-deltanet with `forget` by input channel."""
    q, k, v, A = draw.tokens(draw.DK), draw.keys(draw.DK), draw.tokens(draw.DV), draw.normal(2, 3, 8, 6)
    lr, forget = draw.gate(), draw.gate(draw.DK, high=0.5)
    rule, gates = preset("gated-deltanet").memories()[0].rule, {"lr": lr, "forget": forget[..., None]}
    y, state = scan(rule, init_state(rule, {"w": A}), q * draw.DK**-0.5, k, v, gates)
    given = (x.float().transpose(1, 2) for x in (q, k, v, (1 - forget).log(), lr))
    run = inspect.unwrap(modeling_kimi_linear.recurrent_kimi_delta_attention)
    theirs, last = run(*given, initial_state=A.float(), output_final_state=True)
    found, given = {"y": y, "A": state.A["w"]}, {"y": theirs.transpose(1, 2), "A": last}
    agree("gated-deltanet by key channel", "recurrent_kimi_delta_attention", found, given, TOLERANCE)


def test_mamba2(draw, agree):
    """Its scan, from the time step before softplus: lr = dt, forget = 1 - exp(-rate dt). Its state is (H, Dv, Dk)."""
    q, k, v = draw.tokens(draw.DK), draw.tokens(draw.DK), draw.tokens(draw.DV)
    A, z, rate = draw.normal(2, 3, 8, 6), draw.tokens(), torch.tensor([1.0, 4.0, 16.0]).double()
    dt = torch.nn.functional.softplus(z)
    rule, gates = preset("mamba2").memories()[0].rule, {"lr": dt, "forget": -torch.expm1(-rate[:, None] * dt)}
    y, state = scan(rule, init_state(rule, {"w": A}), q, k, v, gates)
    x, dt, B, C = (x.float().transpose(1, 2) for x in (v, z, k, q))
    theirs, last = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)(
        x,
        dt,
        -rate.float(),
        B,
        C,
        chunk_size=16,
        dt_softplus=True,
        initial_states=A.float().mT,
        return_final_states=True,
    )
    found, given = {"y": y, "A": state.A["w"]}, {"y": theirs.transpose(1, 2), "A": last.mT}
    agree("mamba2", "mamba2_chunk_scan", found, given, TOLERANCE)


def test_mlstm(draw, agree):
    """xLSTM's, whose stabiliser changes no number: a memory of v and 1, and the read divided by max(1, |q n|).

    The gates are given before their links; its own 1e-6 beside the divisor is set to 0.
    """
    q, k, v = draw.tokens(draw.DK), draw.tokens(draw.DK), draw.tokens(draw.DV)
    i, f = draw.tokens(), draw.normal(2, 3, draw.T, scale=2.0) + 3
    rule, gates = preset("mlstm").memories()[0].rule, {"lr": i.exp(), "forget": torch.sigmoid(-f)}
    begun = init_state(rule, {"w": torch.zeros(2, 3, draw.DK, draw.DV + 1).double()})
    y, state = scan(rule, begun, q * draw.DK**-0.5, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), gates)
    y = y[..., :-1] / y[..., -1:].abs().clamp_min(1)

    given = (x.float() for x in (q, k, v, i, f))
    theirs, (C, n, m) = modeling_xlstm.mlstm_recurrent_sequence_native(
        *given, return_last_states=True, eps=0.0
    )
    last = torch.cat([C, n[..., None]], -1) * m[..., None].exp()
    found = {"y": y, "A": state.A["w"]}
    agree("mlstm", "mlstm_recurrent_sequence_native", found, {"y": theirs, "A": last}, TOLERANCE)
