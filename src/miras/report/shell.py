"""The frame of every page: one HTML file with its style and its script inside, which asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from string import Template

from .palette import theme_css
from .text import esc


def render_shell(
    *, title: str, kind: str, header: str, main: str, footer: str, styles: list[str], scripts: list[str]
) -> str:
    """Return a page as HTML text: the assets `styles` and `scripts` by name, the rest as HTML.

    `kind` says above the title what the page is, and is the class of its body. Only the page's own script may run.
    """
    script = "\n".join(map(asset, scripts))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return Template(asset("template.html")).substitute(
        title=esc(title),
        kind=esc(kind),
        style=theme_css() + "".join(map(asset, styles)),
        script=script,
        script_hash=digest,
        header=header,
        main=main,
        footer=footer,
    )


def asset(name: str) -> str:
    """Read a text file that lies beside this module in the package, without its indentation."""
    text = (resources.files("miras.report") / name).read_text(encoding="utf-8")
    return "\n".join(line.strip() for line in text.splitlines())
