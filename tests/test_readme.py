"""The README does what it says: its Python runs, its commands exist, its links lead somewhere."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from miras.cli import COMMANDS, main
from miras.nn.folder import load_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p.name != "training.md"], ids=lambda p: p.name
)
def test_the_python_runs(page, tmp_path, monkeypatch):
    run_python(page, tmp_path, monkeypatch)


def run_python(page, tmp_path, monkeypatch):
    """Run a page's blocks one after the other; a block whose first line names a file is what is in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        if file := re.match(r"# (\S+\.py)\n", code):
            Path(file[1]).write_text(code)
            monkeypatch.delitem(sys.modules, file[1].removesuffix(".py"), raising=False)
        else:
            exec(compile(code, page.name, "exec"), names)


def test_the_example_of_the_readme_is_ten_lines_that_find_the_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = blocks(ROOT / "README.md", "python")[0]
    lines = [line for line in code.splitlines() if line and not line.startswith("import miras")]
    assert len(lines) <= 10
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["answer"].decode() == names["sample"].value
    assert names["sample"].value in capsys.readouterr().out


def test_the_recipe_for_a_model_of_ones_own_goes_on_with_the_command(tmp_path, monkeypatch):
    page = ROOT / "docs" / "training.md"
    run_python(page, tmp_path, monkeypatch)
    (command,) = re.findall(r"^PYTHONPATH=\. miras (train .*)$", page.read_text(), re.M)
    assert main(shlex.split(command)) == 0
    trained = load_model(tmp_path / "runs" / "mine" / "model", trust_remote_code=True)
    assert type(trained.config.memories()[0].rule.bias).__module__ == "my_choices"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_links_exist(page):
    text = page.read_text()
    for command in re.findall(r"^miras (\S+)", text, re.M):
        assert command in COMMANDS, command
    for script in re.findall(r"python (\S+\.py)", text):
        assert (ROOT / script).is_file(), script
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
