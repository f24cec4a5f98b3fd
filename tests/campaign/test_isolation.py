"""No row of a batch sees another, and a stream means the same however it is cut: masks and lengths by chance."""

import random

import pytest
import torch

from miras.nn.lm import LM
from miras.zoo import preset, presets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CASES = 300
SIZES = {"vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 16}
EXTRA = (
    {"chunk_size": 4, "window_size": 6, "num_persistent": 2, "segment_size": 8},
    {"chunk_size": 4, "window_size": 6, "num_persistent": 2},
    {"chunk_size": 4, "segment_size": 8, "num_persistent": 2},
    {"chunk_size": 4},
    {"window_size": 6},
    {},
)


def build(name: str, seed: int) -> LM:
    for extra in EXTRA:
        try:
            config = preset(name).changed(SIZES | extra)
        except ValueError:
            continue
        torch.manual_seed(seed)
        return LM(config).double()
    raise AssertionError(name)


def test_rows_and_cuts():
    rng = random.Random(0)
    names = presets()
    rows = cuts = 0
    for case in range(CASES):
        model = build(names[case % len(names)], case)
        torch.manual_seed(case)
        B, T = 3, rng.randint(2, 25)
        tokens = torch.randint(0, 17, (B, T))
        length = torch.tensor([rng.randint(0, T) for _ in range(B)])
        masks = {
            "valid": torch.arange(T) < length[:, None],
            "write": torch.rand(B, T) < 0.8,
            "reset": torch.rand(B, T) < 0.1,
        }
        used = {name: mask for name, mask in masks.items() if rng.random() < 0.6}
        with torch.no_grad():
            whole, state = model(tokens, **used)
            if case % 2:  # another row changes: this one does not, to the bit
                other = tokens.clone()
                other[1] = torch.randint(0, 17, (T,))
                again, after = model(other, **used)
                for row in (0, 2):
                    assert torch.equal(whole[row], again[row]), (case, names[case % len(names)])
                    assert all(
                        torch.equal(x[row], after.tensors()[n][row]) for n, x in state.tensors().items()
                    )
                rows += 1
            else:
                cut = rng.randint(1, T - 1)
                parts, now = [], None
                for piece in (slice(0, cut), slice(cut, T)):
                    y, now = model(tokens[:, piece], now, **{n: m[:, piece] for n, m in used.items()})
                    parts.append(y)
                torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
                assert now is not None
                for n, x in state.tensors().items():
                    if x.is_floating_point() and not n.endswith((".k", ".v")):
                        torch.testing.assert_close(now.tensors()[n], x, rtol=1e-8, atol=1e-8, equal_nan=True)
                cuts += 1
    print(f"\n| rows of a batch | {rows} cases over {len(names)} presets | 0 saw another, to the bit |")
    print(f"| a stream cut in two | {cuts} cases over {len(names)} presets | 0 differ by more than 1e-8 |")
