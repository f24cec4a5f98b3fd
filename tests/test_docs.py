"""Code in the documents runs as it is written."""

import re
from pathlib import Path

import pytest

from miras.evaluate.describe import design_space

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
COLUMNS = 100


def test_the_page_of_the_space_has_every_preset():
    text = (DOCS / "design-space.md").read_text()
    code = ("memory", "bias", "retention", "algorithm")
    for row in design_space():
        cells = {n: "" if not x else f"`{x}`" if n in code else str(x) for n, x in row.items()}
        cells["preset"] = f"[{row['preset']}](presets/{row['preset']}.md)"
        assert f"| {' | '.join(cells.values())} |" in text
        assert (DOCS / "presets" / f"{row['preset']}.md").is_file()


@pytest.mark.parametrize("page", ["extend.md"])
def test_a_page_runs_as_written(page):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert blocks
    exec("\n".join(blocks), {"__name__": "page"})


def long_lines(text: str) -> list[str]:
    """Lines of prose beyond 100 columns: not tables, headings, pictures or code, and not a link's address."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    prose = [line for line in text.splitlines() if not re.match(r"\s*\||#|!\[|    ", line)]
    return [line for line in prose if len(re.sub(r"\]\([^)]*\)", "]", line)) > COLUMNS]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_lines_of_prose_are_short(page):
    assert not long_lines(page.read_text())


def test_a_long_line_is_found():
    long = "word " * 21
    assert long_lines(f"{long}\n- {long}\n") == [long, f"- {long}"]
    assert not long_lines(f"| {long} |\n\n    {long}\n\n```\n{long}\n```\n")
