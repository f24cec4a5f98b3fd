"""How far the shipped needle model finds its needle, beside its attention-only twin: fresh seeds, both models.

    python benchmarks/needle.py           # 2k and 16k bytes, 50 samples each: a few minutes
    python benchmarks/needle.py --full    # 2k, 16k (200 each), 128k (64), 1M (16), and books as filler

`--models FOLDER` measures models that `miras demo --retrain-needle` wrote; `--write FILE` keeps the rows as JSON.
"""

import argparse
import json
from pathlib import Path

import torch

from miras.data.needle import NeedleTask
from miras.data.novel import load_novel
from miras.demo.needle import load
from miras.evaluate.needle import needle_accuracy

QUICK = ((2048, 50, 50), (16_384, 50, 50))
FULL = ((2048, 200, 100), (16_384, 200, 100), (131_072, 64, 64), (1_000_000, 16, 16))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--seed", type=int, default=20_261)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = load(options.models)
    rows: list[dict[str, object]] = []
    novel = load_novel().train if options.full else None
    for filler in (None, novel) if options.full else (None,):
        for length, n, batch in FULL if options.full else QUICK:
            for name, model in models.items():
                if filler is not None and length > 20_000:
                    continue
                track = name == "memory" and length >= 1_000_000
                result = needle_accuracy(
                    model,
                    NeedleTask(length, filler=filler),
                    n=n,
                    batch_size=batch,
                    seed=options.seed,
                    piece=2048,
                )
                kind = "noise" if filler is None else "books"
                row = {"model": name, "filler": kind, **vars(result)}
                del row["track"]
                if track:
                    watched = needle_accuracy(
                        model,
                        NeedleTask(length, depth=0.01),
                        n=1,
                        batch_size=1,
                        seed=options.seed,
                        track=True,
                        bins=20,
                    ).track
                    assert watched is not None
                    row["write_rate"] = {k: [round(v, 6) for v in x] for k, x in watched.write_rate.items()}
                    row["weight"] = {k: [round(v, 4) for v in x] for k, x in watched.weight.items()}
                rows.append(row)
                share = f"{100 * result.accuracy:.1f} % [{100 * result.low:.1f}, {100 * result.high:.1f}]"
                print(
                    f"{name:7} {kind} {length:9,} bytes, {n:3} samples: {share}, {result.seconds:.0f} s",
                    flush=True,
                )
    if options.write is not None:
        options.write.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
