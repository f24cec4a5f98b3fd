"""The rules of the house that a machine can check: import arrows, what is cheap to import, what is pinned."""

import ast
import io
import pkgutil
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import miras
import miras.data
import miras.evaluate
import miras.hf
import miras.report
import miras.stream

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "miras"

# A package may import its own level and those below; no two packages may import each other; `data` is a leaf.
LEVELS = [
    {"store"},
    {"core"},
    {"engine"},
    {"layers"},
    {"nn"},
    {"zoo"},
    {"train", "evaluate", "stream", "report"},
    {"session"},
    {"demo", "hf", "options", "commands", "cli", "__main__"},
]
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
TOP = len(LEVELS) - 1
DATA_FROM = LEVEL["train"]


def modules(source: Path) -> Iterator[tuple[Path, str]]:
    """Every module below `source` and the top-level name it belongs to."""
    for path in sorted(source.rglob("*.py")):
        yield path, path.relative_to(source).parts[0].removesuffix(".py")


def imported(path: Path, source: Path) -> Iterator[tuple[str, int]]:
    """The absolute dotted names a module imports, wherever it does so, with their lines."""
    package = ["miras", *path.relative_to(source).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for name in node.names:
                # `from miras import core` imports miras.core; deeper, the stem alone decides.
                yield (f"{stem}.{name.name}" if stem == "miras" else stem), node.lineno


def wrong_arrows(source: Path) -> list[str]:
    """Every import under `source` that the house forbids, as readable lines."""
    wrong: list[str] = []
    known = {package for _, package in modules(source)}
    arrows: dict[str, set[str]] = {}
    for path, package in modules(source):
        if package == "__init__":
            continue
        for name, line in imported(path, source):
            where = f"{path.relative_to(source)}:{line} imports {name}: "
            parts = name.split(".")
            if parts[0] == "transformers" and package != "hf":
                wrong.append(where + "only hf.py may import transformers")
            if package == "core" and parts[0] not in {"torch", "miras"} | sys.stdlib_module_names:
                wrong.append(where + "core imports torch, the standard library and itself only")
            if package == "store" and parts[0] not in {"miras"} | sys.stdlib_module_names:
                wrong.append(where + "store imports the standard library and itself only")
            if parts[0] != "miras":
                continue
            target = parts[1] if len(parts) > 1 else ""
            if package not in LEVEL and package != "data":
                wrong.append(where + f"{package!r} has no place in LEVELS; give it one")
            elif target not in known:
                # A name of the lazy root (or the root itself), which reaches everything.
                if target != "__version__" and LEVEL.get(package, 0) < TOP:
                    wrong.append(where + "import from the module that defines it, not from the root")
            elif target == package:
                pass
            elif package == "data":
                if target != "store":
                    wrong.append(where + "data is a leaf and imports nothing of miras but store")
            elif target == "data":
                if LEVEL[package] < DATA_FROM:
                    wrong.append(where + f"{package} may not import data")
            elif target not in LEVEL:
                wrong.append(where + f"{target!r} has no place in LEVELS; give it one")
            elif LEVEL[target] > LEVEL[package]:
                wrong.append(where + f"{package} is below {target}")
            else:
                arrows.setdefault(package, set()).add(target)
    for package, targets in arrows.items():
        wrong += [
            f"{package} and {target} import each other"
            for target in targets
            if package in arrows.get(target, ())
        ]
    return wrong


def test_imports_point_one_way():
    assert wrong_arrows(SOURCE) == []


@pytest.mark.parametrize(
    ("module", "line", "reason"),
    [
        ("core/rule.py", "from miras.nn import LM", "core is below nn"),
        ("core/rule.py", "from ..engine import kernels", "core is below engine"),
        ("core/rule.py", "from miras import engine", "core is below engine"),
        ("core/rule.py", "def f():\n    import miras.train.loop", "core is below train"),
        ("core/rule.py", "import numpy as np", "torch, the standard library and itself only"),
        ("core/rule.py", "from einops import rearrange", "torch, the standard library and itself only"),
        ("core/rule.py", "import miras", "not from the root"),
        ("store/files.py", "import torch", "the standard library and itself only"),
        ("store/files.py", "from miras.core import rule", "store is below core"),
        ("nn/model.py", "from miras import Session", "not from the root"),
        ("nn/model.py", "from miras.data.batches import Batch", "nn may not import data"),
        ("nn/model.py", "import miras.zoo", "nn is below zoo"),
        ("zoo.py", "from miras import data", "zoo may not import data"),
        ("data/text.py", "from miras.core import rule", "data is a leaf"),
        ("data/text.py", "from ..train import loop", "data is a leaf"),
        ("train/loop.py", "from miras.cli import main", "train is below cli"),
        ("train/loop.py", "from transformers import AutoTokenizer", "only hf.py"),
        ("train/loop.py", "from miras.report import html", "import each other"),
        ("extra.py", "from miras.core import rule", "no place in LEVELS"),
    ],
)
def test_a_planted_wrong_arrow_is_caught(tmp_path: Path, module: str, line: str, reason: str):
    plain = {
        "__init__.py": "from miras.cli import main",
        "core/rule.py": "import math\nimport torch\nfrom . import bias\nfrom .bias import L2",
        "core/bias.py": "from miras.core import rule",
        "engine/kernels.py": "from ..core import rule",
        "nn/model.py": "from miras.core.rule import Rule\nfrom miras import __version__",
        "zoo.py": "from miras.nn.model import Config",
        "store/files.py": "import os\nfrom . import signals",
        "data/text.py": "import numpy\nfrom . import text\nfrom miras.store import files",
        "train/loop.py": "from miras.data import text\nfrom miras import zoo",
        "report/html.py": "from miras.train import loop",
        "hf.py": "import transformers\nimport miras",
        "cli.py": "from miras import hf, data",
    }
    for name, text in plain.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert wrong_arrows(tmp_path) == []

    path = tmp_path / module
    path.write_text((path.read_text() if path.exists() else "") + "\n" + line)
    found = wrong_arrows(tmp_path)
    assert any(reason in each for each in found), found


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("miras", ["torch", "transformers", "numpy"]),
        ("miras.cli", ["torch", "transformers"]),
        ("miras.data", ["torch", "transformers"]),
        (
            "miras.commands, miras.session.commands, miras.train.run, miras.report.run",
            ["transformers", "torch._dynamo"],
        ),
    ],
)
def test_imports_stay_cheap(module: str, heavy: list[str]):
    code = f"import sys, {module}; found = set({heavy}) & sys.modules.keys(); assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_module_has_the_name_of_a_public_function():
    # Python binds a submodule to its package on import: miras.presets() would then be a module.
    for package in (miras, miras.data, miras.evaluate, miras.hf, miras.report, miras.stream):
        modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
        assert modules & set(package.__all__) == set(), package


def test_the_public_functions_stay_functions():
    code = "import miras; miras.preset('swa'); import miras.zoo; assert 'swa' in miras.presets()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_direct_dependencies_are_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"]]
    names = {re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0].lower() for line in wanted} - {project["name"]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0]: line.split("==")[1] for line in lines if line and not line.startswith("#")}
    assert names - pins.keys() == set()
    assert not [name for name, version in pins.items() if "+" in version], (
        "a local version suits one machine only"
    )


def test_no_absolute_machine_paths():
    pattern = re.compile(r"(?<![\w./])/(?:root|home|work|opt|Users)/\w")
    for path in [*SOURCE.rglob("*.py"), ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]:
        assert not pattern.search(path.read_text(encoding="utf-8")), path


EXTRAS = (
    "lm_eval",
    "datasets",
    "pyarrow",
    "pandas",
    "scipy",
    "peft",
    "accelerate",
    "matplotlib",
    "hypothesis",
    "pytest",
)


def test_the_demo_needs_nothing_of_the_tests():
    code = f"import sys; sys.modules |= dict.fromkeys({EXTRAS}); import miras.demo.run, miras.demo.fresh, miras.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("target", "wanted"), [("demo", ["-e ."]), ("test", ["-e .", '-e ".[dev]"'])])
def test_make_installs_what_a_target_needs(target, wanted, tmp_path):
    command = ["make", "-n", f"VENV={tmp_path / 'venv'}", target]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"constraints\.txt (-e \S+)$", said, re.M) == wanted


COLUMNS = 100


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Lines of docstrings and comments, with their numbers; not what tells a tool something."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        docstring = token.type == tokenize.STRING and token.line.lstrip().startswith(('"""', 'r"""'))
        if docstring or token.type == tokenize.COMMENT:
            for number in range(token.start[0], token.end[0] + 1):
                if not re.search(r"# (pyright|noqa|type):?", lines[number - 1]):
                    yield number, lines[number - 1]


def test_lines_of_docstrings_and_comments_are_short():
    long = [
        f"{path.relative_to(SOURCE)}:{number}"
        for path, _ in modules(SOURCE)
        for number, line in prose(path.read_text(encoding="utf-8"))
        if len(line) > COLUMNS
    ]
    assert not long


def test_a_long_line_of_prose_is_found():
    long = "word " * 21
    assert [n for n, line in prose(f'"""{long}"""\nx = "{long}"\n# {long}\n') if len(line) > COLUMNS] == [
        1,
        3,
    ]
