"""Code in the documents runs as it is written."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["extend.md"])
def test_a_page_runs_as_written(page):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert blocks
    exec("\n".join(blocks), {"__name__": "page"})
