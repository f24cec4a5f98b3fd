"""`miras report`: read a text once and write a page of what was observed."""

import math
import shlex
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miras.data.tokens import Tokenizer
from miras.nn.threads import set_threads
from miras.report.explorer import facts_of
from miras.report.look import described, is_page, page_of
from miras.report.options import ReportOptions
from miras.report.text import visible
from miras.report.watch import as_text, check_layers, first_tokens, watch
from miras.store.files import check_place
from miras.stream.files import load_state
from miras.stream.source import open_model, open_text, text_blocks, text_tokens
from miras.stream.terminal import progress_bar, size_text


def report(options: ReportOptions) -> int:
    """Write the page; returns the exit status."""
    set_threads(options.threads)
    if options.tokens < 0:
        raise ValueError(
            f"--tokens must be positive, or 0 to read all of the text; it cannot be {options.tokens}"
        )
    check_place("--out", options.out, is_page, "a page of miras")
    model, tokenizer = open_model(options.model, options.trust_remote_code)
    check_layers(model, options.layers)
    state = None if options.load_state is None else load_state(options.load_state, model)[0]
    ids, more = _ids(options, tokenizer)
    try:
        with progress_bar() as progress:
            bar = progress.add_task("reading", total=len(ids), note="")
            watched = watch(
                model,
                tokenizer,
                ids,
                state,
                layers=options.layers,
                piece=options.piece,
                progress=lambda done: progress.update(bar, completed=done, note=f"{done:,} tokens"),
            )
        page = page_of(
            watched,
            facts_of(watched, named(options.model), described(model), more),
            thin=not options.layers,
            title=f"Surprise in {'standard input' if options.file == '-' else Path(options.file).name}",
            command=command_of(options),
        )
        page.save(options.out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no page was written") from None
    goes_on = " (the text is longer: --tokens 0 reads all of it)" if more else ""
    bits = page.bits_per_byte
    rate = "none of them predicted" if math.isnan(bits) else f"{bits:.4f} bits per byte"
    print(f"{len(ids):,} tokens{goes_on}, {rate}")
    for said in (page.agreement, page.left_out):
        if said:
            print(said)
    print(f"Look at {visible(str(options.out))} ({size_text(options.out.stat().st_size)})")
    return 0


def named(folder: Path) -> str:
    """A model's name: its folder with the parent folder, such as first/model."""
    return "/".join(folder.resolve().parts[-2:])


def command_of(options: ReportOptions) -> str:
    """The command line that made the page."""
    words = [
        "miras",
        "report",
        options.kind,
        str(options.model),
        options.file,
        "--tokens",
        str(options.tokens),
    ]
    if options.layers:
        words += ["--layers", *map(str, options.layers)]
    if options.load_state is not None:
        words += ["--load-state", str(options.load_state)]
    return shlex.join(words)


def _ids(options: ReportOptions, tokenizer: Tokenizer) -> tuple[NDArray[np.int64], bool]:
    """The tokens to read, and whether the text has more of them."""
    with closing(open_text(options.file)) as file:
        blocks = as_text(text_blocks(file, options.file), options.file)
        return first_tokens(text_tokens(blocks, tokenizer), options.tokens)
