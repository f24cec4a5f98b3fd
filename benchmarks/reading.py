"""Does the memory help to read? titans-mag against its attention-only twin, paired seeds, equal tokens.

Both are trained on the same lanes of text with carried state, then read held-out text as one stream.

    python benchmarks/reading.py                                   # the embedded novel, its last chapters held out
    python benchmarks/reading.py --equal-time 0 1 2                # then also twins of equal CPU time
    python benchmarks/reading.py --window 64 --out runs/reading64  # attention that sees more
    python benchmarks/reading.py --text novels.tar.xz --heldout Treasure Women    # other text, books held out by name

Resumable: a run that is there is not trained again, so use another --out for other settings.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from miras.core.algorithm import GradientDescent
from miras.core.memory import Matrix
from miras.core.rule import Rule
from miras.data.novel import load_novel
from miras.data.text import read_documents
from miras.nn.config import ModelConfig
from miras.nn.folder import load_model, save_model
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.train.loop import Run
from miras.train.options import Settings
from miras.train.tasks import TextTask
from miras.zoo import attention_twin, preset

BATCH, LENGTH, CHUNK = 8, 256, 16


def reading_config(window: int) -> ModelConfig:
    """A small byte-level titans-mag: linear memory without momentum, a gate half open while it knows nothing."""
    return preset(
        "titans-mag",
        hidden_size=96,
        num_hidden_layers=3,
        num_heads=2,
        window_size=window,
        num_persistent=4,
        rule=Rule(Matrix(), algorithm=GradientDescent(step_bound=1.0), chunk_size=CHUNK),
        gates={"lr": Gate(), "forget": Gate(bias=-6.0)},
        mag_gate="sigmoid",
        initial_scale=0.0,
        tie_word_embeddings=True,
    )


def text(sources: list[str], heldout: list[str]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Training tokens, their document offsets, and the held-out books by name."""
    if not sources:
        novel = load_novel()
        train = np.frombuffer(novel.train, np.uint8)
        return train, np.array([0, len(train)]), {novel.title: np.frombuffer(novel.heldout, np.uint8)}
    books = {d.name: np.frombuffer(d.data, np.uint8) for d in read_documents(sources)}
    held = {n: x for n, x in books.items() if any(part in n for part in heldout)}
    train = [x for n, x in books.items() if n not in held]
    return np.concatenate(train), np.cumsum([0, *map(len, train)]), held


def read(model: LM, book: np.ndarray, mode: str, segment: int, piece: int = 8192) -> float:
    """Mean nats per byte of a book read as one stream: "learning", "frozen" or "reset" at every segment."""
    total, state, last = 0.0, None, None
    tokens = torch.from_numpy(book.astype(np.int64))[None]
    with torch.inference_mode():
        for at in range(0, tokens.shape[1], piece):
            x = tokens[:, at : at + piece]
            place = at + torch.arange(x.shape[1])[None]
            masks = {}
            if mode == "frozen":
                masks["write"] = torch.zeros_like(x, dtype=torch.bool)
            if mode == "reset":
                masks["reset"] = place % segment == 0
            logits, state = model(x, state, **masks)
            if last is not None:
                logits = torch.cat([last, logits], 1)
                x = tokens[:, at - 1 : at + piece]
            last = logits[:, -1:]
            total += torch.nn.functional.cross_entropy(logits[0, :-1], x[0, 1:], reduction="sum").item()
    return total / (tokens.shape[1] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--heldout", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--window", type=int, default=16, help="tokens that attention sees, in both models")
    parser.add_argument(
        "--equal-time", type=int, nargs="*", default=[], help="seeds whose twin also gets equal time"
    )
    parser.add_argument("--bytes", type=int, default=131_072, help="bytes read of each held-out book")
    parser.add_argument("--out", type=Path, default=Path("runs/reading"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.text and not options.heldout:
        parser.error("--text needs --heldout: parts of the names of the books to hold out")
    tokens, offsets, held = text(options.text, options.heldout)
    memory = reading_config(options.window)
    twin = attention_twin(memory)
    rows = []
    for seed in options.seeds:
        runs = {"titans-mag": (memory, options.steps), "twin": (twin, options.steps)}
        if seed in options.equal_time:
            pace = {
                n: took(options.out / f"{n}-{seed}") for n in runs if (options.out / f"{n}-{seed}").exists()
            }
            if len(pace) == 2:  # on the second call, when both have been timed
                longer = options.steps * pace["titans-mag"]["seconds"] / pace["twin"]["seconds"]
                runs["twin, equal time"] = (twin, round(longer))
        for name, (model_config, steps) in runs.items():
            folder = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (folder / "config.json").exists():
                train(folder, name, model_config, tokens, offsets, seed, steps)
            model = load_model(folder).eval()
            modes = ("learning", "reset", "frozen") if name == "titans-mag" else ("learning",)
            for mode in modes:
                nats = [read(model, book[: options.bytes], mode, 2048) for book in held.values()]
                bits = float(np.mean(nats)) / math.log(2)
                row = {"model": name, "seed": seed, "mode": mode, "bits_per_byte": bits, **took(folder)}
                rows.append({**row, "parameters": model.num_parameters()})
                print(json.dumps(rows[-1]), flush=True)
    (options.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    learned = {(r["model"], r["seed"]): r["bits_per_byte"] for r in rows if r["mode"] == "learning"}
    gaps = [learned["twin", s] - learned["titans-mag", s] for s in options.seeds]
    print(
        f"twin minus titans-mag, bits per byte, by seed: {[round(g, 4) for g in gaps]}; mean {np.mean(gaps):.4f}"
    )


def took(folder: Path) -> dict[str, float]:
    """CPU seconds and tokens of a run's training."""
    return json.loads((folder / "took.json").read_text())


def train(
    folder: Path,
    name: str,
    config: ModelConfig,
    tokens: np.ndarray,
    offsets: np.ndarray,
    seed: int,
    steps: int,
) -> None:
    """Train one model and keep it in a folder."""
    torch.manual_seed(seed)
    task = TextTask(tokens, offsets, batch_size=BATCH, seq_len=LENGTH, align=CHUNK, seed=seed)
    run = Run(LM(config), task, Settings(steps=steps, lr=4e-3, warmup=50, weight_decay=0.05))
    began = time.process_time()
    for row in run.until(steps):
        if row["step"] % 100 == 0:
            print(f"{name} {seed} step {row['step']} {row['bits_per_byte']:.3f}", flush=True)
    spent = {"seconds": time.process_time() - began, "tokens": run.tokens, "steps": steps}
    save_model(run.model, folder, {"took.json": json.dumps(spent).encode()})


if __name__ == "__main__":
    main()
