"""What forgetting does to a deep memory, and what keeps it from learning nothing: docs/trainability.md.

    python benchmarks/forgetting.py                 # the table; --markdown for docs/trainability.md
    python benchmarks/forgetting.py --picture FILE  # and the curves

Every variant is titans-lmm at the size of `miras check-training` (2 layers of 64), one thread, the embedded novel.
The curves are those of the untrained model in fp64: |W| along 2,000 tokens, what a change of 1e-10 becomes, and the
outer gradient's norm through so many tokens. The table is `miras.check_training`: 60 steps of 1,024 bytes, states
carried.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.activation import gelu
from miras.core.memory import MLP, Memory, Weights
from miras.core.observe import observe
from miras.core.retention import Decay, Keep, Retention
from miras.data.novel import load_novel
from miras.nn.config import ModelConfig
from miras.nn.lm import LM
from miras.train.check import HORIZON, TrainingCheck, check_training, follow_change
from miras.train.options import CHECK_SIZES
from miras.zoo import override, preset

RESULTS = Path("benchmarks/results/forgetting.json")


@dataclass(frozen=True)
class Floored(Memory):
    """Titans' memory whose norm divides by sqrt(variance + floor^2): what is small stays small."""

    floor: float = 0.1

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        return MLP().shapes(d_key, d_value)

    def apply(self, x: Tensor, w: Weights) -> Tensor:
        y = w.linear("w2", gelu(w.linear("w1", x)))
        return x + F.layer_norm(y, y.shape[-1:], eps=self.floor**2)


@dataclass(frozen=True)
class ConstantNorm(Retention):
    """W = A sqrt(d_out) / |A|: weights of the size they began with, whatever is forgotten (as LaCT has it)."""

    def link(self, A: Tensor) -> Tensor:
        return A * A.shape[-1] ** 0.5 / A.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6)


def variant(bias: float | None, **axes: Any) -> ModelConfig:
    config = preset("titans-lmm").changed(CHECK_SIZES | axes)
    if bias is None:
        return config
    forget = config.memories()[0].gates["forget"]
    return override(config, gates={"forget": dataclasses.replace(forget, bias=bias)})


def slower(config: ModelConfig, scale: float) -> ModelConfig:
    lr = config.memories()[0].gates["lr"]
    return override(config, gates={"lr": dataclasses.replace(lr, scale=scale)})


VARIANTS: dict[str, ModelConfig] = {
    "to 0, 0.7 % (the paper's)": variant(-5.0, retention=Decay()),
    "to 0, 0.7 %, a tenth of the steps": slower(variant(-5.0, retention=Decay()), 0.025),
    "to 0, 0.01 %": variant(-9.0, retention=Decay()),
    "no forgetting": variant(None, retention=Keep()),
    "to 0, 0.7 %, no norm": variant(-5.0, retention=Decay(), memory=MLP(norm=False)),
    "to 0, 0.7 %, floored norm": variant(-5.0, retention=Decay(), memory=Floored()),
    "0.7 %, weights of constant norm": variant(-5.0, retention=ConstantNorm()),
    "to A_0, 0.7 %": variant(-5.0, retention=Decay(towards="initial")),
    "to A_0, 5 %": variant(-3.0, retention=Decay(towards="initial")),
    "to A_0, 5 %, no norm": variant(-3.0, retention=Decay(towards="initial"), memory=MLP(norm=False)),
}
DRAWN = ("to 0, 0.7 % (the paper's)", "to 0, 0.01 %", "to 0, 0.7 %, no norm", "to A_0, 0.7 %", "to A_0, 5 %")
EVERY = 20
"""Tokens of one point of the curves."""
SPANS = (32, 64, 128, 256, 512, 1024)


def curves(config: ModelConfig) -> dict[str, Any]:
    """|W|, the change of the logits and the outer gradient's norm of an untrained model, in fp64."""
    torch.manual_seed(0)
    model = LM(config)
    tokens = torch.from_numpy(np.frombuffer(load_novel().heldout[:HORIZON], np.uint8).astype(np.int64))[None]
    followed = follow_change(model, tokens)
    twin = model.double()
    with observe() as seen, torch.no_grad():
        twin(tokens)
    weight = torch.stack([seen[layer]["weight"][0] for layer in seen.layers()]).mean((0, 1))
    gradient = []
    for span in SPANS:
        twin.zero_grad()
        logits, _ = twin(tokens[:, :span])
        F.cross_entropy(logits[0], tokens[0, 1 : span + 1]).backward()
        squares = [p.grad.square().sum() for p in twin.parameters() if p.grad is not None]
        gradient.append(float(torch.stack(squares).sum().sqrt()))
    return {
        "weight": weight.tolist(),
        "change": followed.change,
        "growth": followed.growth,
        "gradient": gradient,
    }


def summary(check: TrainingCheck) -> dict[str, Any]:
    late = sorted(check.norms["all"][10:])
    found = {
        "last": check.last,
        "reference": check.reference,
        "norm": late[len(late) // 2] if late else None,
        "largest_norm": check.largest_norm if late else None,
        "weight": {layer: each._asdict() for layer, each in check.weight.items()},
        "failed": check.failed,
    }
    for name, each in (("fresh", check.fresh), ("trained", check.trained)):
        found[name] = each and {"growth": each.growth, "last": max(each.change[-256:])}
    return found


def markdown(found: Mapping[str, Any]) -> str:
    lines = [
        "| forgetting | bits per byte | outer gradient: median, largest | \\|W\\| first, smallest, largest "
        "| a change of 1e-10 after 2,000 tokens: untrained, trained |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, each in found.items():
        row = each["training"]
        weights = list(row["weight"].values())
        low, high = (f(w[key] for w in weights) for f, key in ((min, "smallest"), (max, "largest")))
        first = sum(w["first"] for w in weights) / len(weights)
        lines.append(
            f"| {name} | {row['last']:.3f} | {row['norm']:.2g}, {row['largest_norm']:.2g} | {first:.3g}, {low:.3g}, "
            f"{high:.3g} | {row['fresh']['last']:.1e}, {row['trained']['last']:.1e} |"
        )
    reference = next(
        each["training"]["reference"] for each in found.values() if each["training"]["reference"]
    )
    return "\n".join([*lines, f"| Gated DeltaNet of equal size | {reference:.3f} | | | |"])


def picture(found: Mapping[str, Any], file: Path) -> None:
    """Four panels of curves, as an image that matplotlib knows how to write."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    plt.rcParams |= {"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "miras"}
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    colours = ("#c0392b", "#d68910", "#7d6608", "#2471a3", "#1e8449")
    for name, colour in zip(DRAWN, colours, strict=True):
        each = found[name]["curves"]
        at = np.arange(0, HORIZON, EVERY)
        panels[0].plot(at, each["weight"], color=colour, label=name, lw=1.2)
        panels[1].semilogy(at, np.array(each["change"]) + 1e-17, color=colour, lw=1.2)
        panels[2].loglog(SPANS, each["gradient"], "o-", color=colour, lw=1.2, ms=3)
    panels[0].set(xlabel="token", title="|W|", ylim=(0, None))
    panels[1].set(xlabel="token", title="change of the logits after 1e-10 at token 5")
    panels[2].set(xlabel="tokens the gradient flows through", title="norm of the outer gradient")
    panels[2].set_xticks(SPANS, [str(span) for span in SPANS])
    panels[2].minorticks_off()
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where finished variants are kept")
    parser.add_argument("--picture", type=Path, help="an .svg or .png file (needs matplotlib)")
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of what is there, and run nothing"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    for name, config in VARIANTS.items():
        if name in found or options.markdown:
            continue
        print(name, flush=True)
        found[name] = {
            "curves": curves(config),
            "training": summary(check_training(config, reference=not found)),
        }
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(found))
    print(markdown(found))
    if options.picture is not None:
        picture(found, options.picture)


if __name__ == "__main__":
    main()
