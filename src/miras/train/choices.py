"""A memory composed on the command line: `--memory mlp --memory.depth 3 --gates.lr.bias -1.5`, as
flags and in YAML.

This module does not import torch, so --help is fast: the choices are parsed from the sources of
`core` and `nn`.
"""

import ast
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from miras.store.words import folded, kebab

AXES = {
    "memory": ("core/memory.py", "MEMORIES"),
    "bias": ("core/bias.py", "BIASES"),
    "retention": ("core/retention.py", "RETENTIONS"),
    "algorithm": ("core/algorithm.py", "ALGORITHMS"),
    "feature_map": ("nn/feature_map.py", "FEATURE_MAPS"),
}
"""The module with the choices of each axis, and the tuple that names them."""

PARTS = {"gates": ("nn/gates.py", "Gate"), "features": ("nn/memory.py", "Features")}
"""Further settings of a memory."""

HEADS = (*AXES, *PARTS)

Texts = dict[str, str]
"""Choices and their fields: {"memory": "mlp", "memory.depth": "3", "gates.lr.bias": "-1.5"}."""


def take(arguments: list[str]) -> tuple[list[str], Texts]:
    """The arguments without the flags that compose a memory, and the values of those flags.

    A field's flag without a value is true, --algorithm.no-momentum is false. Raises ValueError for
    a flag that does not name a choice.
    """
    rest: list[str] = []
    found: Texts = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        head, dot, _ = name.partition(".")
        if not word.startswith("--") or head not in HEADS:
            rest.append(word)
            continue
        given = bool(equals)
        if not given and words and not words[0].startswith("--"):
            given, value = True, words.pop(0)
        if not given and not dot:
            raise ValueError(f"{flag} must be followed by a name; known are {', '.join(names(head))}")
        before, dot, last = name.rpartition(".")
        if not given:
            name = f"{before}.{last.removeprefix('no_')}"
            value = str(not last.startswith("no_")).lower()
        found[_checked(name)] = value
    return rest, found


def flattened(values: Mapping[Any, Any], head: str = "") -> Texts:
    """The contents of a YAML file in the form of flags: {memory: {name: mlp, depth: 3}} equals
    {memory: mlp, memory.depth: 3}."""
    found: Texts = {}
    for key, value in values.items():
        name = head if key == "name" and head else f"{head}.{key}" if head else str(key)
        if isinstance(value, Mapping):
            found |= flattened(cast(Mapping[Any, Any], value), name)
        else:
            text = str(value)
            found[_checked(name.replace("-", "_"))] = text.lower() if value in (True, False, None) else text
    return found


def over(lower: Texts, higher: Texts) -> Texts:
    """The higher settings over the lower ones; a different choice on an axis drops the lower one's
    fields."""
    other = [axis for axis in AXES if axis in higher and folded(higher[axis]) != folded(lower.get(axis, ""))]
    kept = {name: text for name, text in lower.items() if name.partition(".")[0] not in other}
    return kept | higher


def _checked(name: str) -> str:
    """A flag's name. Raises ValueError if it needs one or two more parts."""
    head, *fields = name.split(".")
    if not all(fields) or (head in PARTS and len(fields) < (2 if head == "gates" else 1)):
        more = "GATE.FIELD, such as --gates.lr.bias" if head == "gates" else "FIELD"
        raise ValueError(f"--{name.replace('_', '-')}: write --{head}.{more}")
    return name


def names(head: str) -> list[str]:
    """The choices of an axis, by their names on the command line."""
    return [kebab(kind) for kind, _ in choices(head)]


@cache
def choices(head: str) -> list[tuple[str, list[str]]]:
    """The classes that a flag may name, each with its fields."""
    file, wanted = (AXES | PARTS)[head]
    source = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
    if head in PARTS:  # the class alone: parsing the rest of a long file would be slow
        source = source[source.index(f"\nclass {wanted}(") :].split("\n\n\n")[0]
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if wanted in classes:
        return [(wanted, list(_fields(classes, wanted)))]
    listed = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and wanted in map(ast.unparse, node.targets)
    )
    kinds = [ast.unparse(each) for each in cast(ast.Tuple, listed).elts]
    return [(kind, list(_fields(classes, kind))) for kind in kinds]


def _fields(classes: Mapping[str, ast.ClassDef], kind: str) -> Iterator[str]:
    """The init fields of a dataclass, those of its bases first."""
    for base in map(ast.unparse, classes[kind].bases):
        if base in classes and classes[base].decorator_list:
            yield from _fields(classes, base)
    for node in classes[kind].body:
        text = ast.unparse(node) if isinstance(node, ast.AnnAssign) else "init=False"
        if "ClassVar" not in text and "init=False" not in text:
            yield text.partition(":")[0]


def told() -> str:
    """The flags that compose a memory, for --help."""
    lines = ["The memory; fields not given are those of the model, or the defaults of a new choice:"]
    for head in HEADS:
        shown = [
            (kebab(kind) if head in AXES else "")
            + (f" ({', '.join(field.replace('_', '-') for field in fields)})" if fields else "")
            for kind, fields in choices(head)
        ]
        flag = {"gates": "--gates.GATE.FIELD", "features": "--features.FIELD"}.get(
            head, "--{0} NAME, --{0}.FIELD".format(head.replace("_", "-"))
        )
        lines.append(f"  {flag}")
        lines += textwrap.wrap(
            ", ".join(shown).strip(),
            74,
            initial_indent="      ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
    lines.append(
        "  such as --memory mlp --memory.depth 3 --algorithm.momentum --algorithm.step-bound 10 --gates.lr.bias -1.5"
    )
    return "\n".join(lines)
