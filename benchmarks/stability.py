"""How large memories become at their default gates: |W| over long streams of one byte, of random bytes, of a novel.

    python benchmarks/stability.py

Each preset reads the three streams at chunk sizes 16 and 64, untrained and after 200 training steps on the embedded
novel, whose held-out chapters are the third stream. |W| is looked at after every token, so that no jump is missed.
Stops when anything is not finite. Prints a table, and draws docs/images/stability.svg.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from miras.core.observe import observe
from miras.data.novel import load_novel
from miras.nn.lm import LM
from miras.presets import preset
from miras.train.loop import Run, Settings
from miras.train.tasks import TextTask

PRESETS = ("titans-lmm", "titans-mag", "swa-lmm")
CHUNKS = (16, 64)
STREAMS = ("one repeated byte", "random bytes", "held-out text")
EVERY, EARLY = 250, 2000

COLOURS = ("#b45309", "#0f766e", "#1d4ed8")
DASHES = ("", "6 3", "2 3")
WIDTH, LEFT, TOP, RIGHT, BOTTOM = 1080, 84, 92, 16, 52
GAP_X, GAP_Y, HEIGHT = 18, 44, 150

Curves = dict[tuple[str, int, int], np.ndarray]
"""|W| after every token by preset, chunk size and training steps: (streams, layers * heads, tokens)."""


def make(name: str, chunk_size: int) -> LM:
    """Two layers of width 32 with two heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "window_size": 8, "num_persistent": 3}
    return LM(preset(name, **sizes, chunk_size=chunk_size))


def train(model: LM, steps: int) -> None:
    """Steps on two lanes of the novel, at least a chunk at a time, states carried."""
    chunk_size = model.config.rule.chunk_size
    tokens = np.frombuffer(load_novel().train, np.uint8)
    task = TextTask(tokens, batch_size=2, seq_len=max(32, chunk_size), align=chunk_size, seed=0)
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


def table(curves: Curves, length: int) -> str:
    """Markdown: |W| after EARLY tokens and at the end, mean over heads; the largest of any head in between."""
    rows = [["preset", "chunk", "training", *STREAMS], ["---", *["---:"] * (2 + len(STREAMS))]]
    for (name, chunk_size, steps), found in curves.items():
        cells = [
            f"{w[:, EARLY - 1].mean():.1f} / {w[:, -1].mean():.1f} / {w[:, EARLY - 1 :].max():.1f}"
            for w in found
        ]
        rows.append([name, str(chunk_size), f"{steps} steps" if steps else "none", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(curves: Curves, length: int) -> str:
    """A row of panels for each preset, all on one log scale, a line for each stream."""
    cases = sorted({key[1:] for key in curves})
    lines = {key: w.mean(1).reshape(len(w), -1, EVERY).max(-1) for key, w in curves.items()}
    ticks = scale(min(w.min() for w in lines.values()), max(w.max() for w in lines.values()))

    def up(value: float) -> float:
        return HEIGHT * math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])

    wide = (WIDTH - LEFT - RIGHT - GAP_X * (len(cases) - 1)) / len(cases)
    tall = TOP + len(PRESETS) * HEIGHT + (len(PRESETS) - 1) * GAP_Y + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#1f2937" role="img" aria-labelledby="t">',
        f'<title id="t">|W| over {length:,} tokens at the default gates</title>',
        f'<rect width="{WIDTH}" height="{tall}" fill="#ffffff"/>',
        text(
            LEFT,
            24,
            f"|W|, mean over heads and layers, the largest of every {EVERY} tokens",
            size=16,
            weight=600,
        ),
    ]
    at = LEFT
    for stream, colour, dash in zip(STREAMS, COLOURS, DASHES, strict=True):
        parts += [line([(at, 46), (at + 30, 46)], colour, dash), text(at + 38, 50, stream)]
        at += 38 + 8 * len(stream) + 24
    for row, name in enumerate(PRESETS):
        y = TOP + row * (HEIGHT + GAP_Y)
        parts.append(text(18, y + HEIGHT / 2, f"{name}, |W|", "middle", turn=True, weight=600))
        for column, (chunk_size, steps) in enumerate(cases):
            x = LEFT + column * (wide + GAP_X)
            trained = f"after {steps} steps" if steps else "untrained"
            parts.append(text(x, y - 8, f"chunk {chunk_size}, {trained}"))
            for tick in ticks:
                place = y + HEIGHT - up(tick)
                parts.append(line([(x, place), (x + wide, place)], "#d1d5db", width=1))
                if column == 0:
                    parts.append(text(x - 8, place + 4, f"{tick:g}", "end"))
            for i in range(3):
                anchor = ("start", "middle", "end")[i]
                parts.append(text(x + wide * i / 2, y + HEIGHT + 17, f"{length * i // 2:,}", anchor, size=11))
            for values, colour, dash in zip(lines[name, chunk_size, steps], COLOURS, DASHES, strict=True):
                places = [
                    (x + wide * (i + 0.5) / len(values), y + HEIGHT - up(v)) for i, v in enumerate(values)
                ]
                parts.append(line(places, colour, dash))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, tall - 10, "tokens read", "middle"))
    return "\n".join([*parts, "</svg>\n"])


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
    parser.add_argument("--tokens", type=int, default=20_000, help=f"a multiple of {EVERY}, at least {EARLY}")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/images/stability.svg"))
    options = parser.parse_args()
    if options.tokens % EVERY or options.tokens < EARLY:
        parser.error(f"--tokens must be a multiple of {EVERY} and at least {EARLY}, got {options.tokens}")
    torch.set_num_threads(options.threads)
    began = time.process_time()
    x = streams(options.tokens)
    curves: Curves = {}
    for name in PRESETS:
        for chunk_size in CHUNKS:
            model = make(name, chunk_size)
            curves[name, chunk_size, 0] = read(model, x)
            train(model, options.steps)
            curves[name, chunk_size, options.steps] = read(model, x)
    print(table(curves, options.tokens))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(draw(curves, options.tokens))
    print(f"{options.out}, {time.process_time() - began:.0f} CPU seconds")


if __name__ == "__main__":
    main()
