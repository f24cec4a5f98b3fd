"""The commands of `miras session`: options in, text out."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from miras.data.tokens import ByteTokenizer
from miras.nn.reading import Piece, Spelling
from miras.nn.threads import set_threads
from miras.session.compare import outer_distance
from miras.session.files import SUFFIX, SessionHeader, read_header
from miras.session.learning import Learning
from miras.session.lock import hold
from miras.session.options import (
    ChatOptions,
    DiffOptions,
    FeedOptions,
    FindOptions,
    ForkOptions,
    MarkOptions,
    ModelOptions,
    NewOptions,
    RecallOptions,
    RewindOptions,
    ShowOptions,
)
from miras.session.session import Fed, Session
from miras.store.files import write_atomically
from miras.store.signals import worked
from miras.stream.generation import check_sampling
from miras.stream.source import open_model, open_text, text_blocks, text_length, text_tokens
from miras.stream.terminal import Plain, progress_bar, say, size_text


def new(options: NewOptions) -> int:
    """Create a session's file."""
    set_threads(options.threads)
    with _fresh(options.session):
        model, tokenizer = open_model(options.model, options.trust_remote_code)
        session = Session(model, tokenizer, keep=options.keep, folder=str(options.model.resolve()))
        session.save(options.session)
    print(f"{_saved(session, options.session)}, model {session.hash}")
    return 0


def feed(options: FeedOptions) -> int:
    """Read a text into a session."""
    learning = None
    if options.learn:
        learning = Learning(lr=options.lr, segment=options.segment, replay=options.replay)
    else:
        usual = {f.name: f.default for f in fields(FeedOptions)}
        given = [n for n in ("lr", "segment", "replay") if getattr(options, n) != usual[n]]
        if given:
            raise ValueError(f"--{given[0]} requires --learn; add it, or omit --{given[0]}")
    name = options.name or ("standard input" if options.file == "-" else Path(options.file).name)
    fed: Fed | None = None
    rate = 0.0

    def read(session: Session) -> None:
        nonlocal fed, rate
        tokenizer, before = session.tokenizer, session.tokens
        spelling = None if isinstance(tokenizer, ByteTokenizer) else Spelling(tokenizer.decode)
        began = time.perf_counter()
        with open_text(options.file) as file, progress_bar() as bar:
            task = bar.add_task("reading", total=text_length(options.file), note="")

            def progress(part: Piece) -> None:
                ids = part.tokens[0]
                size = len(ids) if spelling is None else len(spelling.push(ids).encode())
                bar.update(task, advance=size, note=f"{session.tokens - before:,} tokens")

            ids = text_tokens(text_blocks(file, options.file), tokenizer)
            fed = session.feed(ids, name, piece=options.piece, learning=learning, progress=progress)
        rate = len(fed.tokens) / (time.perf_counter() - began)

    session, said = _written(options.session, options, read)
    assert fed is not None
    print(f"{name}: {len(fed.tokens):,} tokens, loss {_loss(fed.loss)} nats per token, {rate:,.0f} tokens/s")
    if learning is not None:
        share = outer_distance(session.base, session.model)
        print(
            f"outer weights: {session.now.episodes[-1].learned} steps, now {share:.3%} away from the model's"
        )
    print(said)
    return 0


def chat(options: ChatOptions) -> int:
    """Answer each line of standard input."""
    check_sampling(options.tokens, options.temperature, options.top_p, options.seed)

    def talk(session: Session) -> None:
        with session.episode(options.name):
            for turn, line in enumerate(_lines()):
                ids = session.tokenizer.encode(line)
                if not len(ids):
                    continue
                session.feed(ids)
                spelling = Spelling(session.tokenizer.decode)
                for token in session.sample(
                    options.tokens,
                    temperature=options.temperature,
                    top_p=options.top_p,
                    seed=options.seed + turn,
                ):
                    say(spelling.push(np.array([token])))
                say(spelling.rest() + "\n")

    _, said = _written(options.session, options, talk)
    print(said, file=sys.stderr)
    return 0


def _lines() -> Iterator[bytes]:
    """The lines of standard input with their line ends; with a prompt if typed."""
    if not sys.stdin.isatty():
        yield from sys.stdin.buffer
        return
    try:
        while True:
            yield (input("> ") + "\n").encode("utf-8", "surrogateescape")
    except EOFError:
        print()


def fork(options: ForkOptions) -> int:
    """Copy a session's file."""
    with _fresh(options.copy):
        header = read_header(options.session, whole=True)
        write_atomically(options.copy, options.session.read_bytes())
    print(f"{options.copy} continues {options.session} at  {header.tokens:,} tokens")
    return 0


def mark(options: MarkOptions) -> int:
    """Set or drop a mark."""

    def change(session: Session) -> None:
        if options.drop:
            session.unmark(options.name)
        else:
            session.mark(options.name)

    session, said = _written(options.session, options, change)
    done = "dropped" if options.drop else f"set at {session.tokens:,} tokens"
    print(f"mark {options.name!r} {done}; {said}")
    return 0


def rewind(options: RewindOptions) -> int:
    """Go back to a mark."""
    before = read_header(options.session).tokens
    _, said = _written(options.session, options, lambda session: session.rewind(options.name))
    print(f"rewound from {before:,} tokens to {options.name!r}; {said}")
    return 0


def show(options: ShowOptions) -> int:
    """Describe a session."""
    while True:  # another process may save it meanwhile: show one consistent version
        header, session = read_header(options.session), _loaded(options.session, options)
        if read_header(options.session) == header:
            break
    found = session.describe()
    if options.json:
        print(json.dumps({"saved": header.time, "file bytes": header.nbytes, **found}, indent=2))
        return 0
    console = _console()
    console.print(
        f"{options.session}: {found['tokens']:,} tokens in {_many(len(found['episodes']), 'episode')} "
        f"on {_many(found['days'], 'day')}; begun {found['created']}, saved {header.time}"
    )
    console.print(f"model {found['model']} ({header.summary}) in {found['folder'] or 'an unknown folder'}")
    if session.now.delta:
        console.print(f"outer weights differ from the model's by {found['learned']:.3%}, after learning")
    costs = ", ".join(f"{what} {size_text(n)}" for what, n in found["bytes"].items() if n)
    console.print(f"{size_text(header.nbytes)} on disk: {costs}")
    if found["episodes"]:
        table = Table(
            "episode", "when", "from token", "tokens", "loss", "kept", "steps", box=None, pad_edge=False
        )
        for e in found["episodes"]:
            numbers = (
                f"{e['start']:,}",
                f"{e['tokens']:,}",
                _loss(e["loss"]),
                f"{e['kept']:,}",
                str(e["learned"]),
            )
            table.add_row(e["name"], e["time"], *numbers)
        console.print(table, "loss: nats per token while it was read", sep="\n")
    for m in found["marks"]:
        console.print(f"mark {m['name']!r} at {m['tokens']:,} tokens, {size_text(m['bytes'])}")
    for layer, sizes in found["memory"].items():
        console.print(f"{layer}: " + ", ".join(f"|{name}| {size:.4g}" for name, size in sizes.items()))
    return 0


def diff(options: DiffOptions) -> int:
    """Print how far two sessions' memories are apart."""
    before, after = _loaded(options.session, options), _loaded(options.other, options)
    rows = before.diff(after)
    outer = outer_distance(before.model, after.model)
    if options.json:
        told = [{**asdict(row), "share": row.share} for row in rows]
        print(json.dumps({"tokens": [before.tokens, after.tokens], "outer": outer, "memory": told}, indent=2))
        return 0
    console = _console()
    console.print(f"{before.tokens:,} tokens against {after.tokens:,}")
    columns = [f"head {n}" for n in range(len(rows[0].heads))] if options.heads and rows else []
    table = Table("layer", "weight", "|W|", "|W' - W|", "moved", *columns, box=None, pad_edge=False)
    for row in rows:
        shares = [f"{share:.2%}" for share in row.heads] if options.heads else []
        table.add_row(
            row.layer, row.weight, f"{row.size:.4g}", f"{row.distance:.4g}", f"{row.share:.2%}", *shares
        )
    console.print(table if rows else "this model has no memory to compare")
    console.print(f"outer weights: {outer:.3%}")
    return 0


def recall(options: RecallOptions) -> int:
    """Print what is left of each episode."""
    session = _loaded(options.session, options)
    rows = session.recall()
    if options.json:
        print(json.dumps([{**asdict(row), "left": row.left} for row in rows], indent=2))
        return 0
    console = _console()
    if not rows:
        console.print("nothing was fed yet")
        return 0
    learned = bool(session.now.delta)
    more = ("base model",) if learned else ()
    columns = ("episode", "when", "kept of", "now", "right after", "fresh", "another text", "left", *more)
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        losses = [row.now, row.after, row.fresh, row.other, row.left, *([row.base] if learned else [])]
        table.add_row(row.name, row.time, f"{row.kept:,} of {row.tokens:,}", *map(_loss, losses))
    console.print(
        table,
        "nats per token on each episode's first tokens, read without writing: with the memory now, right after it "
        "was read, fresh, and after as much of another text (pages of the embedded novel); left is another "
        "text minus now: what the memory holds of this text beyond any English text",
        sep="\n",
    )
    return 0


def find(options: FindOptions) -> int:
    """Print the sessions in a folder."""
    found = Session.saved(options.folder)
    if options.json:
        print(json.dumps([_plain(path, header) for path, header in found], indent=2))
        return 0
    console = _console()
    table = Table(
        "session", "tokens", "episodes", "marks", "size", "saved", "model", box=None, pad_edge=False
    )
    for path, header in found:
        if isinstance(header, ValueError):
            table.add_row(path.name, "-", "-", "-", "-", "-", str(header))
            continue
        numbers = (f"{n:,}" for n in (header.tokens, len(header.episodes), len(header.marks)))
        table.add_row(path.name, *numbers, size_text(header.nbytes), header.time, header.summary)
    console.print(table if found else f"no session in {options.folder} (files that end in {SUFFIX})")
    return 0


def _plain(path: Path, header: SessionHeader | ValueError) -> dict[str, Any]:
    told = {"error": str(header)} if isinstance(header, ValueError) else asdict(header)
    return {"path": str(path), **told}


RUN: dict[str, Callable[[Any], int]] = {
    "new": new,
    "feed": feed,
    "chat": chat,
    "fork": fork,
    "mark": mark,
    "rewind": rewind,
    "show": show,
    "diff": diff,
    "recall": recall,
    "list": find,
}


@contextmanager
def _fresh(path: Path) -> Iterator[None]:
    """Check and lock the name of a new session. Raises ValueError if it is not valid."""
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: the name of a session ends in {SUFFIX}; call it {path.name}{SUFFIX}")
    if path.exists():
        raise ValueError(f"{path} already exists; choose another name, or remove it first")
    with hold(path):
        yield


def _written(path: Path, options: ModelOptions, change: Callable[[Session], None]) -> tuple[Session, str]:
    """Change the session in a file under its lock, and save it: (session, message).

    It is also saved when a signal interrupts the change; the KeyboardInterrupt then carries the
    message.
    """
    read_header(path)  # do not create a lock beside a file that is not a session

    def save() -> str:
        session.save(path)
        return _saved(session, path)

    with hold(path):
        session = _loaded(path, options)
        return session, worked(lambda: change(session), save)


def _loaded(path: Path, options: ModelOptions) -> Session:
    """The session in a file, with the model given in the options or else in the file."""
    set_threads(options.threads)
    about = read_header(path).about
    folder = Path(about.folder) if options.model is None else options.model
    if options.model is None and not (folder / "config.json").is_file():
        where = (
            f"its model was in {folder}, which no longer exists"
            if about.folder
            else "it does not record where its model is"
        )
        raise FileNotFoundError(f"{path}: {where}; give the folder of model {about.model} with --model")
    model, tokenizer = open_model(folder, options.trust_remote_code)
    session = Session.load(path, model, tokenizer)
    session.folder = str(folder.resolve())
    return session


def _console() -> Plain:
    """Standard output without markup in names; files and pipes have no width to fold columns to."""
    console = Plain(soft_wrap=True)
    return console if console.is_terminal else Plain(soft_wrap=True, width=400)


def _saved(session: Session, path: Path) -> str:
    return f"{path}: {session.tokens:,} tokens ({size_text(path.stat().st_size)})"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
