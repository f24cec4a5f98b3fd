"""Pages from templates: one self-contained HTML file each, with its style and script inside."""

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from miras.report.text import duration, number, visible


def render(template: str, *, package: str = "miras.report", **values: Any) -> str:
    """A page as HTML text, from a template of `package`, which may extend those of `miras.report`.

    All `values` are escaped, and characters that HTML cannot hold are replaced. Only the page's own
    script may run.
    """
    return _environment(package).get_template(template).render(values)


@cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("miras.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"number": number, "duration": duration, "count": "{:,}".format}
    environment.policies["json.dumps_kwargs"] = {}
    script = "\n".join(map(_asset, ("page.js", "chart.js", "explorer.js")))
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    environment.globals |= {
        "style": Markup(_asset("page.css")),
        "script": Markup(script),
        "script_hash": base64.b64encode(digest).decode("ascii"),
    }
    return environment


def _shown(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        return visible(value.replace("\r\n", "\n"))
    return value


def _asset(name: str) -> str:
    """A text file of the templates, without its indentation."""
    text = (resources.files("miras.report") / "templates" / name).read_text(encoding="utf-8")
    return "\n".join(line.strip() for line in text.splitlines())
