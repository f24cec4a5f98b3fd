"""How large memories become at their default gates: |W| over long streams of one byte, of random bytes, of a novel.

    python benchmarks/stability.py

Every preset that has a memory reads the three streams untrained and after 200 training steps on the embedded novel,
whose held-out chapters are the third stream: at its own chunk size, and Titans' also at 64. |W| is looked at after
every token, so that no jump is missed. Stops when anything is not finite. Prints a table, and draws
docs/images/stability.svg.

Resumable: a finished case is one line of `runs.jsonl` and is not measured again.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miras.core.observe import observe
from miras.data.novel import load_novel
from miras.nn.lm import LM
from miras.store.files import write_atomically
from miras.train.loop import Run
from miras.train.options import Settings
from miras.train.tasks import TextTask
from miras.zoo import preset, presets

MEMORIES = tuple(name for name in presets() if preset(name).memories())
CHUNKS = {name: (16, 64) for name in ("titans-lmm", "titans-mag", "swa-lmm")}
"""Chunk sizes where they are others than the preset's own."""
STREAMS = ("one repeated byte", "random bytes", "held-out text")
EVERY = 250

COLOURS = ("#b45309", "#0f766e", "#1d4ed8")
DASHES = ("", "6 3", "2 3")
COLUMNS, WIDE, HEIGHT = 4, 214, 104
LEFT, TOP, BOTTOM, GAP_X, GAP_Y = 60, 84, 40, 52, 50

Row = dict[str, Any]
"""One case: preset, chunk, steps, tokens, cpu_seconds, and by stream `at` (|W| at tokens / 20, tokens / 4 and tokens,
mean over heads and layers), `largest` (of any head from tokens / 20 on), `curve` (the largest mean of every 250)."""


def cases(names: list[str]) -> list[tuple[str, int]]:
    """The presets with the chunk sizes that each is measured at."""
    return [
        (name, size) for name in names for size in CHUNKS.get(name, (preset(name).memories()[0].stride(),))
    ]


def make(name: str, chunk_size: int) -> LM:
    """Two layers of width 32 with two heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "window_size": 8, "num_persistent": 3}
    return LM(preset(name).changed(sizes | {"chunk_size": chunk_size, "segment_size": 64}))


def train(model: LM, steps: int) -> None:
    """Steps on two lanes of the novel, at least a chunk or segment at a time, states carried."""
    stride = model.config.stride()
    tokens = np.frombuffer(load_novel().train, np.uint8)
    task = TextTask(tokens, batch_size=2, seq_len=max(32, stride), align=stride, seed=0)
    for _ in Run(model, task, Settings(steps=steps)).until(steps):
        pass


def streams(length: int) -> torch.Tensor:
    """(3, length), in the order of STREAMS."""
    g = torch.Generator().manual_seed(0)
    text = torch.tensor(list(load_novel().heldout[:length]))
    return torch.stack([torch.full((length,), ord("e")), torch.randint(256, (length,), generator=g), text])


@torch.no_grad()
def read(model: LM, x: torch.Tensor) -> np.ndarray:
    """|W| after every token, (streams, layers * heads, tokens); all that comes out must be finite."""
    state = None
    with observe() as seen:
        for at in range(0, x.shape[1], EVERY):
            logits, state = model(x[:, at : at + EVERY], state)
            for name, part in {"logits": logits, **state.tensors()}.items():
                if not part.isfinite().all():
                    raise SystemExit(f"{name} is not finite within tokens {at} to {at + EVERY}")
    return torch.cat([seen[layer]["weight"] for layer in seen.layers()], 1).numpy()


def measure(name: str, chunk_size: int, steps: int, tokens: int) -> Row:
    """One case from the beginning."""
    began = time.process_time()
    model = make(name, chunk_size)
    if steps:
        train(model, steps)
    row: Row = {"preset": name, "chunk": chunk_size, "steps": steps, "tokens": tokens}
    for stream, w in zip(STREAMS, read(model, streams(tokens)), strict=True):
        row[stream] = {
            "at": [float(w[:, at - 1].mean()) for at in (tokens // 20, tokens // 4, tokens)],
            "largest": float(w[:, tokens // 20 - 1 :].max()),
            "curve": [float(x) for x in w.mean(0).reshape(-1, EVERY).max(-1)],
        }
    return row | {"cpu_seconds": round(time.process_time() - began, 1)}


def table(rows: list[Row]) -> str:
    """Markdown: |W| at three places and the largest of any head."""
    lines = [["preset", "chunk", "training", *STREAMS], ["---", *["---:"] * (2 + len(STREAMS))]]
    for row in rows:
        cells = [
            f"{' / '.join(short(x) for x in row[s]['at'])} ({short(row[s]['largest'])})" for s in STREAMS
        ]
        trained = f"{row['steps']} steps" if row["steps"] else "none"
        lines.append([row["preset"], str(row["chunk"]), trained, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(x: float) -> str:
    """Two digits, or all of those in front of the point up to four."""
    if x >= 9999.5:
        return f"{x:.1e}".replace("e+0", "e")
    return f"{x:.0f}" if x >= 9.95 else f"{x:.1f}" if x >= 0.995 else f"{x:.2f}"


def draw(rows: list[Row]) -> str:
    """A panel for each case, each on its own log scale, a line for each stream."""
    down = -(-len(rows) // COLUMNS)
    width = LEFT + COLUMNS * WIDE + (COLUMNS - 1) * GAP_X + 16
    tall = TOP + down * HEIGHT + (down - 1) * GAP_Y + BOTTOM
    tokens = rows[0]["tokens"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" width="{width}" height="{tall}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#1f2937" role="img" aria-labelledby="t">',
        f'<title id="t">|W| over {tokens:,} tokens after training at the default gates</title>',
        f'<rect width="{width}" height="{tall}" fill="#ffffff"/>',
        text(
            16,
            24,
            f"|W|, mean over heads and layers, the largest of every {EVERY} tokens",
            size=16,
            weight=600,
        ),
    ]
    at = 16
    for stream, colour, dash in zip(STREAMS, COLOURS, DASHES, strict=True):
        parts += [line([(at, 46), (at + 30, 46)], colour, dash), text(at + 38, 50, stream)]
        at += 38 + 8 * len(stream) + 24
    for i, row in enumerate(rows):
        parts += panel(
            row, LEFT + i % COLUMNS * (WIDE + GAP_X), TOP + i // COLUMNS * (HEIGHT + GAP_Y), tokens
        )
    parts.append(text(width / 2, tall - 8, "tokens read", "middle"))
    return "\n".join([*parts, "</svg>\n"])


def panel(row: Row, x: float, y: float, tokens: int) -> list[str]:
    """One case at x, y."""
    curves = [row[stream]["curve"] for stream in STREAMS]
    # What is 0, a memory that nothing was written to yet, has no place on a log scale.
    values = [v for curve in curves for v in curve if v > 0]
    ticks = scale(min(values), max(values))

    def place(value: float) -> float:
        share = math.log(max(value, ticks[0]) / ticks[0]) / math.log(ticks[-1] / ticks[0])
        return y + HEIGHT - HEIGHT * share

    parts = [text(x, y - 8, f"{row['preset']}, chunk {row['chunk']}", weight=600)]
    for tick in (ticks[0], ticks[len(ticks) // 2], ticks[-1]):
        parts.append(line([(x, place(tick)), (x + WIDE, place(tick))], "#d1d5db", width=1))
        parts.append(text(x - 6, place(tick) + 4, f"{tick:g}", "end", size=11))
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        parts.append(text(x + WIDE * share, y + HEIGHT + 15, f"{tokens * share:,.0f}", anchor, size=11))
    for curve, colour, dash in zip(curves, COLOURS, DASHES, strict=True):
        step = WIDE / len(curve)
        parts.append(line([(x + step * (i + 0.5), place(v)) for i, v in enumerate(curve)], colour, dash))
    return parts


def scale(lowest: float, highest: float) -> list[float]:
    """The ticks 1, 2, 5, 10 and so on, the first below `lowest` and the last above `highest`."""
    places = range(math.floor(math.log10(lowest)) - 1, math.ceil(math.log10(highest)) + 1)
    ticks = [m * 10.0**place for place in places for m in (1, 2, 5)]
    return ticks[sum(t <= lowest for t in ticks) - 1 : sum(t < highest for t in ticks) + 1]


def text(
    x: float,
    y: float,
    words: str,
    anchor: str = "start",
    *,
    size: int = 13,
    weight: int = 400,
    turn: bool = False,
) -> str:
    """A line of text, upwards if `turn`."""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"{turned}>'
        f"{words}</text>"
    )


def line(places: list[tuple[float, float]], colour: str, dash: str = "", *, width: float = 1.8) -> str:
    """A line through places."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", nargs="*", choices=MEMORIES, default=list(MEMORIES), metavar="NAME", help="default: all"
    )
    parser.add_argument("--tokens", type=int, default=20_000, help=f"a multiple of 20 and of {EVERY}")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--figure", type=Path, default=Path("docs/images/stability.svg"))
    options = parser.parse_args()
    if options.tokens < EVERY or options.tokens % math.lcm(20, EVERY):
        parser.error(f"--tokens must be a multiple of 20 and of {EVERY}, got {options.tokens}")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "runs.jsonl"
    kept = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    rows: list[Row] = []
    for name, chunk_size in cases(options.preset):
        for steps in (0, options.steps):
            key = {"preset": name, "chunk": chunk_size, "steps": steps, "tokens": options.tokens}
            row = next((row for row in kept if row.items() >= key.items()), None)
            if row is None:
                row = measure(name, chunk_size, steps, options.tokens)
                kept.append(row)
                write_atomically(file, "".join(json.dumps(each) + "\n" for each in kept).encode())
            rows.append(row)
    print(table(rows))
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    options.figure.write_text(draw([row for row in rows if row["steps"]]))
    print(f"{options.figure}, {sum(row['cpu_seconds'] for row in rows):.0f} CPU seconds")


if __name__ == "__main__":
    main()
