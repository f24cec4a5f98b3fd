"""Suggestions for misspelled names."""

import difflib
import re
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion, ", perhaps you meant 'x'", with the nearest known word; "" if none is near."""
    words = {_plain(word): word for word in known}
    plain = _plain(name)
    parts = [word for word in words if plain in word.split("-")]
    close = difflib.get_close_matches(plain, list(words), 1) or (parts if len(parts) == 1 else [])
    return f", perhaps you meant {words[close[0]]!r}" if close else ""


def folded(name: str) -> str:
    """A name without case and hyphens: GatedMLP, gated-mlp and gated_mlp are equal."""
    return re.sub("[-_]", "", name).lower()


def kebab(name: str) -> str:
    """The name of a class on the command line: GatedMLP is gated-mlp."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def _plain(word: str) -> str:
    return word.lower().replace("_", "-").replace(" ", "-")
