"""`miras check-training`: runs `check_training` and prints its result."""

import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from miras.data.text import read_documents
from miras.nn.compose import composed
from miras.nn.config import ModelConfig
from miras.nn.folder import read_config
from miras.nn.threads import check_seed, set_threads
from miras.store.files import check_place, write_atomically
from miras.train.check import (
    CHANGE,
    HORIZON,
    LARGEST_NORM,
    LARGEST_STEP,
    Sensitivity,
    TrainingCheck,
    check_training,
)
from miras.train.options import CHECK_SIZES, CheckOptions
from miras.zoo import override, preset, presets

OUT_OF_RANGE = 1


def check(options: CheckOptions) -> int:
    """Print the result of a short training run; returns 1 if something is out of range."""
    set_threads(options.threads)
    check_seed(options.seed)
    if options.json is not None:
        check_place("--json", options.json, _is_check, "a check's JSON")
    config = _config(options)
    documents = list(read_documents(options.text)) if options.text else []
    tokens = np.frombuffer(b"".join(each.data for each in documents), np.uint8) if documents else None
    beside = " beside Gated DeltaNet of equal size" if options.reference else ""
    print(f"{options.model}: training {options.steps} steps{beside} ...", file=sys.stderr, flush=True)
    found = check_training(
        config,
        steps=options.steps,
        lr=options.lr,
        own_lr=options.own_lr,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        seed=options.seed,
        tokens=tokens,
        reference=options.reference,
    )
    if options.json is not None:
        write_atomically(options.json, json.dumps(found.to_dict(), indent=1).encode())
    report(options.model, found, _console())
    return OUT_OF_RANGE if found.problems() else 0


def _config(options: CheckOptions) -> ModelConfig:
    """The model to train: a preset, small unless sizes are given, or a folder's."""
    if options.model in presets():
        config = preset(options.model).changed(CHECK_SIZES)
    elif Path(options.model).exists():
        config = read_config(Path(options.model), trust_remote_code=options.trust_remote_code)
    else:
        config = preset(options.model)  # suggests similar names
    return override(config, **options.sizes(), **composed(config, options.rule, options.trust_remote_code))


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    # Files and pipes have no width to fold lines to.
    return console if console.is_terminal else Console(highlight=False, markup=False, width=160)


def report(name: str, found: TrainingCheck, console: Console) -> None:
    """The measurements with their allowed ranges, and what to change."""
    settings = found.settings
    console.print(f"{name}: {found.parameters:,} parameters, {len(found.loss)} steps, lr {settings.lr:g}")
    table = Table("", "measured", "in range", box=None, pad_edge=False)
    beside = "" if found.reference is None else f"Gated DeltaNet {found.reference:.3f}"
    table.add_row("bits per byte at last", f"{found.last:.3f}", beside)
    for group, norms in sorted(found.norms.items(), key=lambda each: each[0] != "all"):
        late = sorted(norms[10:])
        limit = f"at most {LARGEST_NORM:g}" if group == "all" else ""
        whole = "outer gradient" if group == "all" else f"  {group}"
        # Carried states leave the initial memory behind, unless forgetting leads back to it.
        seen = f"{late[len(late) // 2]:.3g}, at most {late[-1]:.3g}" if late else "none after ten steps"
        table.add_row(whole, seen, limit)
    table.add_row(f"steps clipped at {settings.clip:g}", f"{found.clipped:.0%}", "")
    for layer, each in found.weight.items():
        table.add_row(
            f"|W|, {layer}",
            f"initially {each.first:.3g}, {each.smallest:.3g} to {each.largest:.3g}, finally {each.last:.3g}",
            "",
        )
        table.add_row(f"|step| / |W|, {layer}", f"{found.step[layer]:.3g}", f"at most {LARGEST_STEP:g}")
    for when, each in (("untrained", found.fresh), ("trained", found.trained)):
        if each is not None:
            table.add_row(f"a change of {CHANGE:g}, {when}", _followed(each), "growth at most 0")
    console.print(table)
    problems = found.problems()
    if not problems:
        console.print("Everything is in range.")
    for problem in problems:
        console.print(f"\nOut of range: {problem.what}.\n  To change: {problem.advice}.")


def _followed(each: Sensitivity) -> str:
    marks = ", ".join(
        f"{each.change[t]:.1e} at {t:,}" for t in (100, 600, 1000, HORIZON - 1) if t < len(each.change)
    )
    return f"logits {marks}, state {each.state:.1e}; {each.growth:+.3g} nats per 1,000 tokens"


def _is_check(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(found, dict) and {"norms", "problems"} <= found.keys()
