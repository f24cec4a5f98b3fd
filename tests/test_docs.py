"""Code in the documents runs as it is written."""

import re
from pathlib import Path

import pytest

from miras.evaluate.describe import design_space

DOCS = Path(__file__).parents[1] / "docs"


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
