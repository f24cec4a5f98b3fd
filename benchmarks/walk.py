"""How far a token walks through the source: files entered, functions, and changes of file of one forward pass.

    python benchmarks/walk.py                                   # the table
    python benchmarks/walk.py --preset titans-mag --trace       # the walk itself, each call under its caller

A model of one layer reads 64 tokens as training does, once to warm up and once watched by `sys.setprofile`. Counted
are calls of Python code under src/miras: its files, its functions (a name in a file), and the changes of file, there
and back: a call from one file into another is two of them.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import miras
from miras.nn.lm import LM
from miras.zoo import preset

ROOT = Path(miras.__file__).parent
PRESETS = ("titans-mag", "titans-mac", "deltanet", "transformer")


@dataclass
class Walk:
    """The calls of miras' own functions in order: how many of them are open around each, its file, its name."""

    calls: list[tuple[int, str, str]] = field(default_factory=list[tuple[int, str, str]])

    def files(self) -> set[str]:
        return {file for _, file, _ in self.calls}

    def functions(self) -> set[tuple[str, str]]:
        return {(file, name.rpartition(".")[2]) for _, file, name in self.calls}

    def changes(self) -> int:
        callers: list[str] = []
        count = 0
        for depth, file, _ in self.calls:
            count += 2 * (depth > 0 and callers[depth - 1] != file)
            callers[depth:] = [file]
        return count

    def printed(self) -> str:
        """Each call on a line, indented below its caller; a call repeated in a row stands once, with its count."""
        lines: list[list[Any]] = []
        for call in self.calls:
            if lines and lines[-1][0] == call:
                lines[-1][1] += 1
            else:
                lines.append([call, 1])
        return "\n".join(
            f"{'  ' * depth}{file}:{name}{f' x {count}' if count > 1 else ''}"
            for (depth, file, name), count in lines
        )


def walk(run: Callable[[], Any]) -> Walk:
    """The walk of a call."""
    seen, known, open_calls = Walk(), dict[str, str | None](), 0

    def place(frame: FrameType) -> str | None:
        name = frame.f_code.co_filename
        if name not in known:
            path = Path(name)
            known[name] = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None
        return known[name]

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal open_calls
        if event not in ("call", "return") or (file := place(frame)) is None:
            return
        if event == "return":
            open_calls -= 1
            return
        seen.calls.append((open_calls, file, frame.f_code.co_qualname))
        open_calls += 1

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


def forward(name: str, tokens: int) -> Walk:
    """The walk of a preset's forward pass in training, at a small size."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 64, "num_persistent": 2}
    model = LM(preset(name).changed(sizes))
    ids = torch.randint(64, (2, tokens))
    model(ids)
    return walk(lambda: model(ids))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", nargs="+", default=PRESETS)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--trace", action="store_true", help="print the walk, not the table")
    options = parser.parse_args()
    if not options.trace:
        print("| one layer, training | files | functions | changes of file |\n|---|---:|---:|---:|")
    for name in options.preset:
        seen = forward(name, options.tokens)
        if options.trace:
            print(f"{name}\n{seen.printed()}")
        else:
            print(f"| {name} | {len(seen.files())} | {len(seen.functions())} | {seen.changes()} |")


if __name__ == "__main__":
    main()
