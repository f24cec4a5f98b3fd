"""The commands `info`, `list`, `eval`, `generate` and `stream`: options in, text out."""

import dataclasses
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from miras.data.novel import load_novel
from miras.data.tokens import ByteTokenizer, prepare
from miras.evaluate.describe import describe, design_space
from miras.evaluate.stream import Curve, stream_curve
from miras.nn.compose import composed
from miras.nn.config import ModelConfig
from miras.nn.folder import model_hash, read_config
from miras.nn.lm import LM, LMState
from miras.nn.reading import Mask, Spelling, read_pieces
from miras.nn.threads import set_threads
from miras.options import EvalOptions, GenerateOptions, InfoOptions, ListOptions, StreamOptions
from miras.store.files import check_place, write_atomically
from miras.store.signals import worked
from miras.stream.files import check_state_place, load_state, save_state
from miras.stream.generation import Generation, check_sampling
from miras.stream.generation import generate as generation
from miras.stream.run import never
from miras.stream.source import open_model, open_text, text_blocks, text_length, text_tokens
from miras.stream.terminal import progress_bar, say, size_text
from miras.zoo import override, preset, presets


def info(options: InfoOptions) -> int:
    """Describe a model."""
    name, config = options.model, _config(options.model, options.trust_remote_code)
    given = options.sizes() | composed(config, options.rule, options.trust_remote_code)
    given |= {} if options.vocab_size is None else {"vocab_size": options.vocab_size}
    config = override(config, **given)
    found = describe(config)
    if options.json:
        print(json.dumps(found, indent=2, allow_nan=False, default=str))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    kinds = [kind for i, kind in enumerate(found["layers"]) if not i or kind != found["layers"][i - 1]]
    uniform = f"{len(found['layers'])} x {kinds[0]}" if len(kinds) == 1 else ", ".join(found["layers"])
    console.print(
        f"[bold]{escape(name)}[/]: {uniform}; hidden {config.hidden_size}, "
        f"heads {config.num_heads} of {config.width()}"
    )
    for each in found["mixers"]:
        if len(found["mixers"]) > 1:
            console.print(f"\n[bold]{escape(each['name'])}[/]")
        console.print(*each["words"], sep="\n")
        for memory in each["memories"]:
            _show_memory(console, memory)
    growth = ", growing with every token" if found["state_grows"] else ", whatever was read"
    console.print(
        f"\n{found['parameters']:,} parameters; state of a stream {size_text(found['state_bytes'])}{growth}; "
        f"{found['flops_per_token']:,} FLOPs per token"
    )
    return 0


def _show_memory(console: Console, memory: dict[str, Any]) -> None:
    table = Table("axis", "choice", "meaning", box=None, pad_edge=False)
    for axis, part in memory["choices"].items():
        table.add_row(axis, part["choice"], part["meaning"])
    console.print("\n[bold]the memory[/]", table, "\n[bold]per head[/]", sep="\n", markup=True)
    console.print(*memory["equations"], memory["features"], sep="\n", markup=False)
    table = Table("gate", "made as", "b at first", "at most", "one per", box=None, pad_edge=False)
    for gate, made in memory["gates"].items():
        most = "no bound" if made["largest"] is None else f"{made['largest']:g}"
        table.add_row(gate, made["formula"], f"{made['initial_bias']:g}", most, made["per"])
    console.print("\n[bold]gates[/]", table, sep="\n")


def show(options: ListOptions) -> int:
    """Print the presets as a table."""
    rows = design_space()
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console = Console(highlight=False)
    if not console.is_terminal:  # files and pipes have no width to fold the columns to
        console = Console(highlight=False, width=400)
    console.print(table)
    return 0


def evaluate(options: EvalOptions) -> int:
    """Print bits per byte of a stream under each condition."""
    set_threads(options.threads)
    if options.json is not None:
        check_place("--json", options.json, _is_curves, "a file of curves")
    model, tokenizer = open_model(options.model, options.trust_remote_code)
    twin = None if options.twin is None else open_model(options.twin, options.trust_remote_code)
    if twin is not None and twin[1].fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{options.twin} has another tokenizer than {options.model}: their tokens differ")
    if options.tokens is not None and options.tokens < 2:
        raise ValueError(f"--tokens must be at least 2, got {options.tokens}")
    if any(reader.config.grows() for reader in (model, *(twin or ())[:1])):
        print(
            f"Full attention: the state would grow with every token, so it is reset every "
            f"{options.segment:,} tokens (--segment).",
            file=sys.stderr,
        )
    runs = [(condition, model, condition) for condition in options.conditions]
    runs += [] if twin is None else [("twin", twin[0], "learning")]
    if not runs:
        raise ValueError("nothing to do: name at least one of --conditions, or a --twin")
    curves: dict[str, Curve] = {}
    with tempfile.TemporaryDirectory() as cache:
        if options.text:
            tokens: NDArray[Any] = prepare(options.text, tokenizer, cache).tokens
        else:
            tokens = tokenizer.encode(load_novel().heldout)
        tokens = tokens[: options.tokens]
        with progress_bar() as progress:
            for name, reader, condition in runs:
                bar = progress.add_task(name, total=len(tokens), note="")
                curves[name] = stream_curve(
                    reader,
                    tokens,
                    condition,
                    segment=options.segment,
                    warm=options.warm,
                    bins=options.bins,
                    piece=options.piece,
                    tokenizer=tokenizer,
                    progress=lambda done, bar=bar: progress.update(bar, completed=done),
                )
    table = Table("condition", "bits per byte", "first tenth", "last tenth", "tokens/s")
    for name, curve in curves.items():
        tenth = max(1, len(curve.bits_per_byte) // 10)
        ends = (curve.bits_per_byte[:tenth], curve.bits_per_byte[-tenth:])
        numbers = [curve.mean, *(float(np.mean(end)) for end in ends)]
        table.add_row(name, *(f"{x:.4f}" for x in numbers), f"{curve.num_tokens / curve.seconds:,.0f}")
    first = next(iter(curves.values()))
    Console().print(table, f"{first.num_tokens:,} tokens, {first.num_bytes:,} bytes scored", sep="\n")
    if options.json is not None:
        written = {
            "model": str(options.model),
            "model_hash": model_hash(model),
            "twin": None if options.twin is None else str(options.twin),
            "text": list(options.text),
            "segment": options.segment,
            "warm": options.warm,
            "curves": [{"name": name, **dataclasses.asdict(curve)} for name, curve in curves.items()],
        }
        write_atomically(options.json, (json.dumps(written, indent=1) + "\n").encode())
        print(f"curves written to {options.json}")
    return 0


def generate(options: GenerateOptions) -> int:
    """Print a continuation as it is generated."""
    set_threads(options.threads)
    check_state_place("--save-state", options.save_state)
    check_sampling(options.tokens, options.temperature, options.top_p, options.seed)
    model, tokenizer = open_model(options.model, options.trust_remote_code)
    state = _loaded(options.load_state, model)
    prompt = tokenizer.encode(options.prompt)
    spelling = Spelling(tokenizer.decode)
    made: Generation | None = None

    def speak() -> None:
        nonlocal made
        made = generation(
            model,
            prompt,
            options.tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            state=state,
            compiled=options.compile,
        )
        for token in made:
            say(spelling.push(np.array([token])))
        say(spelling.rest() + "\n")

    said = worked(speak, lambda: _saved(options.save_state, state if made is None else made.state, model))
    if options.save_state is not None:
        print(said, file=sys.stderr)
    return 0


def stream(options: StreamOptions) -> int:
    """Read a text of any length and print its bits per byte."""
    set_threads(options.threads)
    check_state_place("--save-state", options.save_state)
    model, tokenizer = open_model(options.model, options.trust_remote_code)
    if model.config.grows():
        print(
            "Full attention: the state and the time per token grow with the text.",
            file=sys.stderr,
        )
    state = _loaded(options.load_state, model)
    before = 0 if state is None else int(state.tokens[0])
    mask: Mask | None = None if options.write else never
    spelling = None if isinstance(tokenizer, ByteTokenizer) else Spelling(tokenizer.decode)
    count, size, nats = 0, 0.0, 0.0
    began = time.perf_counter()

    def take() -> None:
        nonlocal state, count, size, nats
        with open_text(options.file) as file, progress_bar() as progress:
            bar = progress.add_task("reading", total=text_length(options.file), note="")
            ids = text_tokens(text_blocks(file, options.file), tokenizer)
            for part in read_pieces(model, ids, state, piece=options.piece, write=mask):
                read = part.tokens.shape[1]
                length = read if spelling is None else len(spelling.push(part.tokens[0]).encode())
                scored = int((~np.isnan(part.losses)).sum())
                nats += float(np.nansum(part.losses, dtype=np.float64))
                size += length * scored / read
                state, count = part.state, count + read
                note = _rates(count, before, nats, size, time.perf_counter() - began)
                progress.update(bar, advance=length, note=note)

        if not count:
            raise ValueError(
                f"{'standard input' if options.file == '-' else options.file} is empty: nothing to read"
            )

    try:
        said = worked(take, lambda: _saved(options.save_state, state, model))
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{count:,} tokens were read; {stop}") from None
    print(_rates(count, before, nats, size, time.perf_counter() - began))
    if options.save_state is not None:
        print(said)
    return 0


def _config(name: str, trusted: bool) -> ModelConfig:
    if name in presets() or not (Path(name) / "config.json").is_file():
        if Path(name).exists() and name not in presets():
            raise FileNotFoundError(f"{name} is not a model: it has no config.json")
        return preset(name)
    return read_config(name, trust_remote_code=trusted)


def _is_curves(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(found, dict) and "curves" in found


def _loaded(path: Path | None, model: LM) -> LMState | None:
    if path is None:
        return None
    state, header = load_state(path, model)
    if len(header.tokens) != 1:
        raise ValueError(f"{path} holds {len(header.tokens)} streams; a command can continue only one")
    return state


def _saved(path: Path | None, state: LMState | None, model: LM) -> str:
    """Save a state if a file is given, and report it."""
    if path is None:
        return "nothing was saved (no --save-state)"
    if state is None:
        return "nothing was saved, because nothing was read"
    header = save_state(path, state, model)
    return f"state after {header.tokens[0]:,} tokens saved to {path} ({size_text(path.stat().st_size)})"


def _rates(count: int, before: int, nats: float, size: float, seconds: float) -> str:
    bits = f"{nats / math.log(2) / size:.4f} bits per byte, " if size else ""
    after = f" after {before:,} earlier" if before else ""
    return f"{count:,} tokens{after}, {bits}{count / seconds:,.0f} tokens/s"
