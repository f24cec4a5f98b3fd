"""How far the shipped needle model finds its needle in text of kinds that it was never trained on, beside its twin.

    python benchmarks/needle.py                            # 2k and 16k bytes, every held-out filler: some minutes
    python benchmarks/needle.py --full                     # also 128k and 1M, and two and four needles
    python benchmarks/needle.py --filler lorem digits --needles 2 --lengths 2048
    python benchmarks/needle.py --books FOLDER             # also books of one's own, as the filler "books"

Fresh seeds, both models, and at the end a table of the model with memory by filler and length. `--models FOLDER`
measures models that `miras demo --retrain-needle` wrote; `--write FILE` keeps the rows as JSON, and a row that is
there already is not measured again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from miras.data.fillers import FILLERS, HELDOUT, Book, Shelf, read_books
from miras.data.needle import NeedleTask
from miras.demo.needle import NAMES, load
from miras.evaluate.needle import needle_accuracy
from miras.nn.lm import LM

SAMPLES = {2048: 100, 16_384: 50, 131_072: 16, 1_000_000: 8}
"""Haystacks of each length that are read, side by side as far as memory allows."""
KINDS = ("letters", "word", "number", "code")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all lengths; one, two and four needles")
    parser.add_argument("--filler", nargs="+", choices=[*FILLERS, "books"])
    parser.add_argument("--books", type=Path, help="folder of texts for the filler `books`")
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--needles", nargs="+", type=int)
    parser.add_argument("--samples", type=int, help="haystacks of each length")
    parser.add_argument(
        "--kinds", action="store_true", help="keys and values of every kind, not only numbers"
    )
    parser.add_argument("--only", choices=NAMES, help="one of the two models")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--seed", type=int, default=20_261)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fillers: dict[str, Any] = {name: name for name in FILLERS}
    if options.books is not None:
        fillers["books"] = Shelf(tuple(Book(text) for text in read_books(options.books)))
    chosen = options.filler or [*HELDOUT, *(["books"] if options.books else [])]
    if "books" in chosen and "books" not in fillers:
        parser.error("--filler books needs --books FOLDER, a folder of texts")
    lengths = options.lengths or (list(SAMPLES) if options.full else [2048, 16_384])
    needles = options.needles or ([1, 2, 4] if options.full else [1])
    models = load(options.models, NAMES if options.only is None else (options.only,))

    rows: list[dict[str, Any]] = []
    if options.write is not None and options.write.exists():
        rows = json.loads(options.write.read_text())
    for count in needles:
        for length in lengths:
            if count > 1 and length > 20_000 and options.lengths is None:
                continue
            for filler in chosen:
                n = options.samples or SAMPLES.get(length, max(8, 200_000 // length))
                task = NeedleTask(length, filler=fillers[filler], needles=count)
                if options.kinds:
                    task = NeedleTask(length, filler=task.filler, needles=count, keys=KINDS, values=KINDS[1:])
                for name, model in models.items():
                    about = {
                        "model": name,
                        "filler": filler,
                        "needles": count,
                        "kinds": "all" if options.kinds else "letters and numbers",
                        "length": length,
                        "n": n,
                    }
                    if any(about.items() <= row.items() for row in rows):
                        continue
                    rows.append(about | measured(model, task, n, options.seed))
                    print(line(rows[-1]), flush=True)
                    if options.write is not None:
                        options.write.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def measured(model: LM, task: NeedleTask, n: int, seed: int) -> dict[str, Any]:
    """What `needle_accuracy` finds, and of the longest haystacks what the memory did along one of them."""
    result = needle_accuracy(model, task, n=n, batch_size=min(n, 50), seed=seed, piece=2048)
    row = {k: v for k, v in vars(result).items() if k not in ("track", "length", "n")}
    if task.length >= 1_000_000 and model.config.memories():
        first = NeedleTask(task.length, filler=task.filler, depth=0.01)
        watched = needle_accuracy(model, first, n=1, batch_size=1, seed=seed, track=True, bins=20).track
        assert watched is not None
        row["write_rate"] = {k: [round(v, 6) for v in x] for k, x in watched.write_rate.items()}
        row["weight"] = {k: [round(v, 4) for v in x] for k, x in watched.weight.items()}
    return row


def line(row: dict[str, Any]) -> str:
    """One row, in words."""
    share = f"{100 * row['accuracy']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    many = f"{row['needles']} needle{'s' * (row['needles'] > 1)}"
    return (
        f"{row['model']:7} {row['filler']:9} {many:9} {row['length']:9,} bytes, {row['n']:3} samples: {share}, "
        f"{row['seconds']:.0f} s"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Needles found, in %, by filler and length: a table in Markdown for each model, kind and number of needles."""
    parts: list[str] = []
    groups = list(dict.fromkeys((r["model"], r["kinds"], r["needles"]) for r in rows))
    for model, kinds, needles in groups:
        mine = [r for r in rows if (r["model"], r["kinds"], r["needles"]) == (model, kinds, needles)]
        lengths = sorted({r["length"] for r in mine})
        found = {(r["filler"], r["length"]): f"{100 * r['accuracy']:.0f}" for r in mine}
        parts += [
            f"\n{model}, {needles} needle{'s' * (needles > 1)}, {kinds}:\n",
            "| filler | " + " | ".join(f"{n:,}" for n in lengths) + " |",
            "|---|" + "---:|" * len(lengths),
        ]
        for filler in dict.fromkeys(r["filler"] for r in mine):
            cells = (found.get((filler, n), "") for n in lengths)
            parts.append(f"| {filler} | " + " | ".join(cells) + " |")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
