"""The command `miras`: a table of functions by name, options from flags and YAML, errors in one
line."""

import contextlib
import dataclasses
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from miras.store.signals import Held
from miras.store.terminal import printable
from miras.store.words import nearest
from miras.train import choices

T = TypeVar("T")

COMMON = """

Every command also takes:
  --config FILE.yaml   values for these options, under those given here
  --debug              the whole traceback of an error (also MIRAS_DEBUG=1)
"""


# Each function imports its dependencies after parsing the options, so --help does not import torch.
def train(arguments: list[str]) -> int:
    """Train a model on text or on needles."""
    from miras.train.options import TrainOptions

    options = parse(TrainOptions, "train", arguments)
    from miras.train.run import begun
    from miras.train.run import train as run

    if options.resume:  # below the flags and the file: the options the run was started with
        options = parse(TrainOptions, "train", arguments, begun(options.out))
    return run(options)


def check_training(arguments: list[str]) -> int:
    """Train a preset for a few steps and check whether it learns."""
    from miras.train.options import CheckOptions

    options = parse(CheckOptions, "check-training", arguments)
    from miras.train.checking import check

    return check(options)


def demo(arguments: list[str]) -> int:
    """Train a small model, stream through it and write a report."""
    from miras.demo.options import DemoOptions

    options = parse(DemoOptions, "demo", arguments)
    from miras.demo.run import demo as run

    return run(options)


def info(arguments: list[str]) -> int:
    """Describe a preset or a model folder."""
    from miras.options import InfoOptions

    options = parse(InfoOptions, "info", arguments)
    from miras import commands

    return commands.info(options)


def show(arguments: list[str]) -> int:
    """Show the presets as points of the design space."""
    from miras.options import ListOptions

    options = parse(ListOptions, "list", arguments)
    from miras import commands

    return commands.show(options)


def evaluate(arguments: list[str]) -> int:
    """Measure bits per byte along a stream, learning, frozen and reset."""
    from miras.options import EvalOptions

    options = parse(EvalOptions, "eval", arguments)
    from miras import commands

    return commands.evaluate(options)


def generate(arguments: list[str]) -> int:
    """Continue a text."""
    from miras.options import GenerateOptions

    options = parse(GenerateOptions, "generate", arguments)
    from miras import commands

    return commands.generate(options)


def stream(arguments: list[str]) -> int:
    """Read a text of any length in constant memory and save what was learned."""
    from miras.options import StreamOptions

    options = parse(StreamOptions, "stream", arguments)
    from miras import commands

    return commands.stream(options)


def report(arguments: list[str]) -> int:
    """Write a page that shows what surprised a model in a text."""
    from miras.report.options import ReportOptions

    options = parse(ReportOptions, "report", arguments)
    from miras.report.run import report as run

    return run(options)


def session(arguments: list[str]) -> int:
    """Keep a memory from day to day: feed, chat, fork, compare and test it."""
    from miras.session.options import COMMANDS as KINDS

    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h"):
        print(_overview("miras session", {each: kind.__doc__ for each, kind in KINDS.items()}))
        return 0 if arguments else 2
    options = parse(KINDS[_known(name, KINDS)], f"session {name}", arguments[1:])
    from miras.session.commands import RUN

    return RUN[name](options)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "check-training": check_training,
    "eval": evaluate,
    "generate": generate,
    "stream": stream,
    "report": report,
    "session": session,
    "info": info,
    "list": show,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0 for success; 1 if training stopped at a non-finite loss; 2 for errors that the user can fix;
    130 after Ctrl-C, SIGTERM or a closed terminal; 141 for a closed pipe.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("MIRAS_DEBUG", "0") not in ("", "0")
    arguments = [each for each in arguments if each != "--debug"]
    with Held() as stops:
        status = _status(arguments, debug, stops)
        stops.over(leaving=argv is None)
    return status


def _status(arguments: list[str], debug: bool, stops: Held) -> int:
    """Run a command so that a signal stops it, report errors, and return the exit status."""
    try:
        with stops.obeyed():
            status = _dispatch(arguments)
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader is gone, as in `miras info ... | head`. Discard what Python would still flush.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        _say(f"\nmiras: stopped{''.join(f'; {each}' for each in stop.args)}")
        return 130
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich exits in its own way
            return 141
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        _say(f"miras: {_line(error)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if debug or not (isinstance(error, MemoryError) or any(x in str(error) for x in _NO_ROOM)):
            raise
        _say("miras: out of memory; choose smaller sizes")
        return 2


_NO_ROOM = ("allocate memory", "out of memory", "Storage size calculation overflowed")
"""Torch's messages when memory runs out."""


def _say(text: str) -> None:
    """Print a line on standard error, if it is still open."""
    with contextlib.suppress(OSError):
        print(printable(text) if sys.stderr.isatty() else text, file=sys.stderr)


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        from miras import __version__

        print(f"miras {__version__}")
        return 0
    if name in ("--help", "-h"):
        print(_overview("miras", {each: run.__doc__ for each, run in COMMANDS.items()}))
        return 0 if arguments else 2
    return COMMANDS[_known(name, COMMANDS)](arguments[1:])


def _known(name: str, commands: Iterable[str]) -> str:
    if name not in commands:
        raise ValueError(
            f"unknown command {name!r}{nearest(name, commands)}; known are {', '.join(commands)}"
        )
    return name


def _overview(program: str, about: Mapping[str, str | None]) -> str:
    """The commands of a program, each with its summary."""
    lines = [f"  {name:<14} {(text or '').strip().splitlines()[0]}" for name, text in about.items()]
    return "\n".join(
        [
            f"usage: {program} COMMAND [OPTIONS]",
            "",
            "Memory that learns at test time, for sequence models.",
            "",
            *lines,
            "",
            f"`{program} COMMAND --help` shows a command's options, `miras --version` the version.",
        ]
    )


def parse(options: type[T], name: str, arguments: list[str], under: Mapping[str, Any] | None = None) -> T:
    """A command's options: flags override the `--config` file, which overrides `under`.

    Exits with 2 on wrong flags.
    """
    import tyro

    arguments, path = _config_flag(arguments)
    composes = "rule" in {field.name for field in dataclasses.fields(cast(Any, options))}
    rule: dict[str, str] = {}
    about = COMMON
    if composes:
        arguments, rule = choices.take(arguments)
        about += f"\n{choices.told()}\n" if {"--help", "-h"} & set(arguments) else ""
    default: Any = tyro.MISSING_NONPROP
    if path is not None or under:
        values = {} if path is None else _loaded(options, Path(path))
        if under and composes:
            values["rule"] = choices.over(under.get("rule", {}), values.get("rule", {}))
        default = _defaults(options, {**(under or {}), **values}, path)
    found = tyro.cli(
        options,
        prog=f"miras {name}",
        description=(options.__doc__ or "").strip() + about,
        args=arguments,
        config=(tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone),
        default=default,
    )
    if not rule:
        return found
    return dataclasses.replace(cast(Any, found), rule=choices.over(cast(Any, found).rule, rule))


def _config_flag(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments without `--config FILE`, and FILE."""
    rest: list[str] = []
    path = None
    words = iter(arguments)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise ValueError("--config must be followed by a YAML file")
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
    return rest, path


def _loaded(options: type[Any], path: Path) -> dict[str, Any]:
    """The options that a YAML file gives."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"No such config file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
        # Nested aliases can expand a few lines to gigabytes, and no option needs them.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError(f"{path} has a YAML alias (*name); write the value out")
        loaded: Any = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict | None):
        raise ValueError(f"{path} must hold one `name: value` per line")
    fields = [field.name for field in dataclasses.fields(options)]
    composes = "rule" in fields
    fields = [*(name for name in fields if name != "rule"), *(choices.HEADS if composes else ())]
    kinds = typing.get_type_hints(options)
    values: dict[str, Any] = {}
    for key, value in (loaded or {}).items():
        name = str(key).replace("-", "_")
        if composes and name.partition(".")[0] in choices.HEADS:
            values["rule"] = values.get("rule", {}) | choices.flattened({key: value})
            continue
        if name not in fields:
            raise ValueError(
                f"{path}: unknown key {str(key)!r}{nearest(name, fields)}; known are {', '.join(fields)}"
            )
        try:
            values[name] = _value(value, kinds[name])
        except ValueError:
            kind = getattr(kinds[name], "__name__", kinds[name])
            raise ValueError(f"{path}: {name} must be {kind}, got {value!r}") from None
    return values


def _defaults(options: type[T], values: Mapping[str, Any], path: str | None) -> T:
    """The options with those values; anything without a value or default must be given as a
    flag."""
    import tyro

    fields = {field.name: field for field in dataclasses.fields(cast(Any, options))}
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    open_ones = [name for name in required if name not in values]
    if open_ones and required.index(open_ones[-1]) >= len(open_ones):
        # Otherwise a positional argument would be ambiguous.
        given = ", ".join(name for name in required if name in values)
        raise ValueError(f"{path} gives {given}, so it must also give {', '.join(open_ones)}, or neither")
    return options(**values, **dict.fromkeys(open_ones, tyro.MISSING))


def _value(value: Any, kind: Any) -> Any:
    """A YAML value as its field's type. Raises ValueError if it does not fit."""
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if value is None else _value(value, next(x for x in parts if x is not types.NoneType))
    if typing.get_origin(kind) is tuple:
        return tuple(_value(each, parts[0]) for each in (value if isinstance(value, list) else [value]))
    if typing.get_origin(kind) is typing.Literal and value in parts:
        return value
    if isinstance(value, bool) and kind is bool:
        return value
    # A bool is an int to Python, but not a number to a user.
    if type(value) in (int, float, str) and kind in (int, float, str, Path):
        # Parsed as text, like a flag: YAML reads 3e-4 as text, and 2.5 is not an integer.
        return kind(str(value))
    raise ValueError


def _line(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror}{where}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
