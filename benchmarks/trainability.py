"""The bounds of tests/train/test_trainability.py: how every preset with a memory trains at the suite's size.

    python benchmarks/trainability.py                  # five seeds at lr 3e-3, one at 1e-3; 15 minutes of one core
    python benchmarks/trainability.py --preset yaad    # measured anew
    python benchmarks/trainability.py --literal        # the papers' forgetting towards 0, in a table; nothing is kept

Each cell is `miras.check_training`: 60 steps of one lane of 512 bytes, 2 layers of 32, states carried. The ratio is
that of its loss (bits per byte, mean of the last ten steps) to Gated DeltaNet's of equal size and seed. A bound is
the worst ratio of all seeds plus 2 %. Resumable: what is in the file is not run again.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from miras.nn.config import ModelConfig
from miras.store.files import write_atomically
from miras.train.check import TrainingCheck, check_training
from miras.train.options import CHECK_SIZES
from miras.zoo import override, preset, presets

FILE = Path(__file__).parent.parent / "tests/train/trainability.json"
SIZES = CHECK_SIZES | {"hidden_size": 32}
TRAINING: dict[str, Any] = {"steps": 60, "batch_size": 1, "seq_len": 512}
SEEDS = {3e-3: range(5), 1e-3: range(1)}
MARGIN = 1.02


def remembering() -> list[str]:
    """The presets that have a memory."""
    return [name for name in presets() if preset(name).memories()]


def trained(config: ModelConfig, seed: int, lr: float, reference: bool = False) -> TrainingCheck:
    return check_training(config, **TRAINING, seed=seed, lr=lr, reference=reference, sensitivity=False)


def measure(found: dict[str, Any], names: list[str], file: Path) -> None:
    """Fill what is missing in `found`, and write it after every preset."""
    for lr, seeds in SEEDS.items():
        part = found.setdefault(f"{lr:g}", {})
        for name in names:
            rows = part.setdefault(name, {"ratios": [], "largest_norms": []})
            for seed in list(seeds)[len(rows["ratios"]) :]:
                check = trained(preset(name).changed(SIZES), seed, lr, reference=True)
                assert check.reference is not None
                rows["ratios"].append(round(check.last / check.reference, 4))
                rows["largest_norms"].append(round(check.largest_norm, 2))
                rows.setdefault("references", []).append(round(check.reference, 4))
            rows["bound"] = math.ceil(max(rows["ratios"]) * MARGIN * 1e4) / 1e4
            write_atomically(file, (json.dumps(found, indent=1) + "\n").encode())
            print(f"{lr:g} {name}: {rows['ratios']}, norm at most {max(rows['largest_norms'])}", flush=True)


def literal(name: str) -> ModelConfig | None:
    """The preset with its paper's forgetting towards 0, or None where it has no other."""
    config = preset(name).changed(SIZES)
    retention = config.memories()[0].rule.retention
    if not retention.returns:
        return None
    return override(config, retention=dataclasses.replace(retention, towards="zero"))  # pyright: ignore


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", nargs="*", default=[], help="measure these anew")
    parser.add_argument("--literal", action="store_true", help="the papers' forgetting instead")
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(options.file.read_text()) if options.file.exists() else {}
    if options.literal:
        print("| preset | ratio, as it is | ratio, to 0 | largest gradient norm, as it is | to 0 |")
        print("|---|---:|---:|---:|---:|")
        for name in options.preset or remembering():
            if (config := literal(name)) is not None:
                check = trained(config, 0, 3e-3)
                mine = found["0.003"][name]
                ratio = check.last / mine["references"][0]
                print(
                    f"| {name} | {mine['ratios'][0]:.2f} | {ratio:.2f} | {mine['largest_norms'][0]:.2g} | "
                    f"{check.largest_norm:.2g} |",
                    flush=True,
                )
        return
    for part in found.values():
        for name in options.preset:
            part.pop(name, None)
    measure(found, options.preset or remembering(), options.file)


if __name__ == "__main__":
    main()
