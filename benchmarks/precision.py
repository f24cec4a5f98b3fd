"""What rounding does to a long stream: fp32 beside fp64, and the same text in other pieces.

    python benchmarks/precision.py            # the deep presets, and two linear ones; eight minutes of one core
    python benchmarks/precision.py --preset yaad --literal     # with the paper's forgetting towards 0

Each model has 2 layers of 32 and was trained for 200 steps of 512 bytes of the embedded novel, states carried, lr
3e-3. It then reads 8,192 bytes of held-out text. KL: mean over tokens of KL(fp64 || fp32) of the next byte's
distribution. Cuts: the largest difference of the logits between pieces of 512 and of 500 tokens in fp32, in units of
the largest logit. Growth: nats per 1,000 tokens of a change of 1e-10 in fp64 (`miras.check_training`).
"""

import argparse
import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor

from miras.data.novel import load_novel
from miras.nn.lm import LM
from miras.train.check import HORIZON, follow_change
from miras.train.loop import Run
from miras.train.options import CHECK_SIZES, Settings
from miras.train.tasks import TextTask
from miras.zoo import override, preset, presets

SIZES = CHECK_SIZES | {"hidden_size": 32}
LENGTH = 8192


def trained(name: str, literal: bool, steps: int) -> LM:
    config = preset(name).changed(SIZES)
    retention = config.memories()[0].rule.retention
    if literal and retention.returns:
        config = override(config, retention=dataclasses.replace(retention, towards="zero"))  # pyright: ignore
    torch.manual_seed(0)
    model = LM(config)
    text = np.frombuffer(load_novel().train, np.uint8)
    task = TextTask(text, batch_size=1, seq_len=512, align=config.stride(), seed=0)
    for _ in Run(model, task, Settings(steps=steps)).until(steps):
        pass
    return model


@torch.no_grad()
def read(model: LM, tokens: Tensor, piece: int) -> Tensor:
    """The logits (T, vocab) of tokens (1, T) that are read in pieces."""
    parts, state = [], None
    for at in range(0, tokens.shape[1], piece):
        logits, state = model(tokens[:, at : at + piece], state)
        parts.append(logits[0])
    return torch.cat(parts)


def rounding(model: LM, tokens: Tensor) -> tuple[float, float]:
    """Mean KL of fp32 from fp64, and the largest relative difference between cuts at 512 and at 500."""
    single, cut = read(model, tokens, 512), read(model, tokens, 500)
    double = read(copy.deepcopy(model).double(), tokens, 512)
    p, q = double.log_softmax(-1), single.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return float(kl), float((single - cut).abs().max() / single.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    deep = [n for n in presets() if any(each.rule.retention.returns for each in preset(n).memories())]
    parser.add_argument("--preset", nargs="*", default=[*deep, "ttt-mlp", "gated-deltanet"])
    parser.add_argument("--literal", action="store_true", help="forget towards 0, as the papers print it")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokens = torch.from_numpy(np.frombuffer(load_novel().heldout[:LENGTH], np.uint8).astype(np.int64))[None]
    print("| preset | mean KL, fp32 from fp64 | other cuts | growth |\n|---|---:|---:|---:|", flush=True)
    for name in options.preset:
        model = trained(name, options.literal, options.steps)
        kl, cut = rounding(model, tokens)
        growth = follow_change(model, tokens[:, :HORIZON]).growth
        print(f"| {name} | {kl:.1e} | {cut:.1e} | {growth:+.2g} |", flush=True)


if __name__ == "__main__":
    main()
