"""Which test catches which mistake: plants mistakes in core and engine, one at a time, and runs the tests on each.

    python benchmarks/mutants.py                            # all of them, half an hour and more of a core
    python benchmarks/mutants.py --only core/bias.py Dot    # those in whose file or description one of the words is
    python benchmarks/mutants.py --list                     # what they are; are all still where the source has them?

A mistake is planted in a copy of the tree and the tests run until the first fails, those of the mistaken file's own
test file before the others. Prints a table of what caught each, and exits with 1 when one was not caught. A text that
a source has no longer, or more than once, is an error: whoever changed the line changes the mistake with it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/core", "tests/engine")
TIMEOUT = 1800


class Mutant(NamedTuple):
    """A mistake: in a file of src/miras the text, which stands there once, becomes another."""

    file: str
    text: str
    instead: str
    what: str


MUTANTS = (
    # the law
    Mutant(
        "core/bias.py",
        "return 0.5 * (pred - target).square().sum(-1)",
        "return (pred - target).square().sum(-1)",
        "L2 without its half",
    ),
    Mutant("core/bias.py", "return -(pred * target).sum(-1)", "return (pred * target).sum(-1)", "Dot's sign"),
    Mutant(
        "core/bias.py",
        "inside = square.detach().sqrt() <= delta",
        "inside = square.detach() <= delta",
        "Huber's threshold is asked of the square",
    ),
    Mutant("core/bias.py", "self._slope(self.clip) * beyond", "beyond", "Lp's slope beyond the clip"),
    Mutant(
        "core/bias.py",
        "return 0.5 * square + D * (size + 0.5 * D)",
        "return 0.5 * square + D * (0.5 * size + 0.5 * D)",
        "Robust counts the radius half",
    ),
    Mutant("core/retention.py", "return keep * A + step", "return A + step", "nothing is forgotten"),
    Mutant(
        "core/retention.py",
        "return z - z.clamp(-gamma, gamma)",
        "return z - z.clamp(-gamma, 2 * gamma)",
        "the soft threshold is not symmetric",
    ),
    Mutant(
        "core/retention.py",
        "power.pow(2 / self.q - 1)",
        "power.pow(1 / self.q - 1)",
        "LqNorm's norm to another power",
    ),
    Mutant(
        "core/retention.py",
        "for d in _DIMS[axis]]) ** 0.5 if",
        "for d in _DIMS[axis]]) if",
        "Simplex's scale without its root",
    ),
    Mutant(
        "core/retention.py",
        "log_w = _along(A, self.axis, torch.log_softmax)",
        "log_w = A",
        "FDivergence starts from what is no distribution",
    ),
    Mutant("core/memory.py", "gelu(y) if i > 1 else y", "gelu(y)", "an MLP's key goes through gelu too"),
    Mutant("core/memory.py", "return x + y if residual else y", "return y", "no residual"),
    Mutant(
        "core/memory.py",
        'return d_key**-0.5 if self.bias_input == "key" else 1.0',
        'return d_key**-1 if self.bias_input == "key" else 1.0',
        "the input of TTT's biases",
    ),
    Mutant(
        "core/memory.py",
        'F.silu(w.linear("w1", x)) * w.linear("w3", x)',
        'F.silu(w.linear("w3", x)) * w.linear("w1", x)',
        "GatedMLP's gate is the other map",
    ),
    Mutant(
        "core/algorithm.py",
        "return product((1 - strength * size[..., None, :] * overlap).clamp_min(0))",
        "return product(1 - strength * size[..., None, :] * overlap)",
        "the step bound may turn a step around",
    ),
    Mutant(
        "core/algorithm.py",
        "return lr / (1 + lr * k.square().sum(-1))",
        "return lr / (1 + k.square().sum(-1))",
        "the implicit step forgets lr",
    ),
    Mutant(
        "core/algorithm.py",
        "else momentum * before + step",
        "else momentum * before + (1 - momentum) * step",
        "momentum as a mean",
    ),
    Mutant(
        "core/algorithm.py", "(3.4445, -4.7750, 2.0315)", "(3.4445, -4.7750, 2.0135)", "a digit of Muon's"
    ),
    Mutant(
        "core/recurrence.py",
        "phase = state.phase + there.long()",
        "phase = state.phase + 1",
        "padding takes a place in a chunk",
    ),
    Mutant(
        "core/recurrence.py",
        'at = {"after": after.A, "before": state.A}',
        'at = {"after": state.A, "before": state.A}',
        "a token reads before it writes",
    ),
    Mutant(
        "core/recurrence.py",
        "anchor = {n: w * kept[n] for n, w in anchor.items()}",
        "anchor = dict(anchor)",
        "decayed=True takes its gradient at the undecayed memory",
    ),
    Mutant(
        "core/recurrence.py",
        'if name == "forget" else gate',
        "if False else gate",
        "every step of a token forgets",
    ),
    Mutant(
        "core/rule.py",
        "recent={n: torch.zeros_like(r) for n, r in state.recent.items()},",
        "recent=state.recent,",
        "the step bound remembers the chunk before",
    ),
    Mutant(
        "core/rule.py",
        "retained={n: torch.ones_like(r) for n, r in state.retained.items()},",
        "retained=state.retained,",
        "what is retained goes on into the next chunk",
    ),
    Mutant(
        "core/rule.py",
        'begin = torch.zeros_like if "returns" in rule.form else torch.clone',
        "begin = torch.clone",
        "the initial memory counts twice where forgetting leads back to it",
    ),
    # the dual form and what it is made of
    Mutant(
        "engine/tables.py", "table=steps @ H * step", "table=H @ steps * step", "keep and momentum swapped"
    ),
    Mutant(
        "engine/tables.py",
        "first_S = steps @ H0[..., None]",
        "first_S = H0[..., None]",
        "old surprise is not summed up",
    ),
    Mutant(
        "engine/dual.py",
        "return torch.baddbmm(y, x, fixed.base[name]) if fixed.base else y",
        "return y",
        "a read without the initial memory",
    ),
    Mutant(
        "engine/tables.py",
        "key = tuple(id(g) for g in own.values())",
        'key = (id(own["lr"]),)',
        "weights that share lr share all their gates",
    ),
    Mutant(
        "engine/tables.py",
        "steps = steps * write[..., None, :]",
        "steps = steps * 1",
        "an unwritten token's momentum is written",
    ),
    Mutant(
        "engine/tables.py",
        "abs().tril(-1)",
        "abs().tril()",
        "a token's step is bounded by its own key",
    ),
    Mutant(
        "engine/gradient.py",
        "state = replace(state, phase=phase, recent=recent)",
        "state = replace(state, phase=phase)",
        "the keys of an open chunk are lost",
    ),
    Mutant(
        "engine/tables.py",
        "return found + F.pad((table[..., :-1, :] * after).sum(-1), (1, 0))",
        "return found + F.pad((table[..., :-1, :] * after).sum(-1), (0, 1))",
        "the gradient of products, a token off",
    ),
    Mutant(
        "engine/kernels.py",
        "return by_a, by_b, shares[0] * after",
        "return by_a, by_b, after",
        "the gradient of what was accumulated before",
    ),
    Mutant(
        "engine/kernels.py",
        "found += [_dot(g, _flat(W)), (g * share).view(W.shape)]",
        "found += [_dot(g, _flat(W)), g.view(W.shape)]",
        "the gradient of the memory before a chunk",
    ),
    Mutant(
        "engine/kernels.py",
        "return side * weight, by_d, side.mul_(keys).sum(-1, keepdim=True)",
        "return side, by_d, side.clone().mul_(keys).sum(-1, keepdim=True)",
        "the gradient of keys where weights are wide",
    ),
    # the scan of an MLP
    Mutant("engine/mlp.py", "return by_k, -by_e, by_W", "return by_k, by_e, by_W", "the gradient of v"),
    Mutant(
        "engine/mlp.py",
        "by_k = by_x[0] + by_e if form.residual else by_x[0]",
        "by_k = by_x[0]",
        "the gradient of k through the residual",
    ),
    Mutant(
        "engine/mlp.py",
        "z[:, -1] += w",
        "z[:, -1] += 0",
        "the gradient of the initial memory through what is written",
    ),
    Mutant(
        "engine/mlp.py",
        "apart=chunks.open or any(end is not None for end in chunks.ends),",
        "apart=chunks.open,",
        "the anchor of a row that ended in an earlier group",
    ),
    Mutant(
        "engine/mlp.py",
        "by_h.append(bent[i] * by_d[i])",
        "by_h.append(0 * by_d[i])",
        "the second derivative of gelu",
    ),
    Mutant(
        "engine/mlp.py",
        "f += mine.masked_fill(~rows[..., None], 0)",
        "f += 0",
        "the gradient of what a document begins with",
    ),
    # other forms
    Mutant(
        "engine/channels.py",
        "late = step.times(Sides.of(after))",
        "late = step",
        "steps by channel do not decay to the chunk's end",
    ),
    Mutant(
        "engine/tiles.py",
        "by_A[r, cut] = g[:, 0] * share[:, 0]",
        "by_A[r, cut] = g[:, 0]",
        "the gradient of the memory before a tile",
    ),
    Mutant(
        "engine/formed.py",
        "step = torch.where(write[:, None, :, None, None], step, 0)",
        "step = step * 1",
        "an unwritten token's surprise is written",
    ),
    Mutant(
        "engine/exact.py",
        "table = late(c.table, 0) * (k @ k.mT)",
        "table = c.table * (k @ k.mT)",
        "a token's gradient is taken after its own step",
    ),
    Mutant(
        "engine/exact.py",
        "pred, table = pred * c.keep[..., None], table * c.keep[..., None]",
        "pred = pred * c.keep[..., None]",
        "what the block itself wrote does not decay before the gradient",
    ),
    Mutant(
        "engine/exact.py",
        "grown = (k * after).mT @ written",
        "grown = k.mT @ written",
        "a block's writes do not decay to its end",
    ),
    Mutant(
        "engine/decode.py",
        "d = torch.addcmul(d - mean, normed, along, value=-1).mul_(scale)",
        "d = (d - mean).mul_(scale)",
        "decoding leaves out a part of the norm's derivative",
    ),
    Mutant(
        "engine/decode.py",
        "ends = [(place + 1) % rule.chunk_size == 0 for place in plan.place]",
        "ends = [place % rule.chunk_size == 0 for place in plan.place]",
        "decoding closes a chunk a token late",
    ),
    # where tokens lie
    Mutant(
        "engine/plan.py",
        "valid.cumsum(1) - 1 - before.gather(1, document)",
        "valid.cumsum(1) - 1",
        "later documents do not begin their own chunk",
    ),
    Mutant(
        "engine/plan.py",
        "return tuple(n - begins[-1] if begins else place + n for place, n, begins in rows)",
        "return tuple(place + n for place, n, begins in rows)",
        "a state's place counts the documents before",
    ),
    Mutant(
        "engine/chunks.py",
        "write = layout.there if write is None else write & layout.there",
        "write = layout.there",
        "ragged rows write what they should only read",
    ),
    Mutant("engine/chunks.py", "open=chunks.open and i == 0", "open=False", "groups forget an open chunk"),
    Mutant(
        "engine/scan.py",
        "return has_factors(rule) and plan.watch is None and not _by_channel(rule, call.gates)",
        "return has_factors(rule) and not _by_channel(rule, call.gates)",
        "a watched call takes the way that knows no inner loss",
    ),
)


def misplaced(mutants: tuple[Mutant, ...]) -> list[str]:
    """The mistakes whose text does not stand exactly once in their file."""
    wrong: list[str] = []
    for mutant in mutants:
        path = ROOT / "src/miras" / mutant.file
        count = path.read_text().count(mutant.text) if path.exists() else 0
        if count != 1:
            wrong.append(f"{mutant.file} has {count} times {mutant.text!r} ({mutant.what})")
    return wrong


def run(tree: Path, tests: list[str]) -> str | None:
    """The first test that fails in a tree, or None; runs that do not end count as caught."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT} seconds"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" ")[1] if lines else f"pytest ended with {done.returncode}"


def caught(mutant: Mutant, tree: Path, tests: list[str]) -> str | None:
    """The first test that fails on a mistake, or None."""
    path = tree / "src/miras" / mutant.file
    whole = path.read_text()
    folder, name = mutant.file.split("/")
    own = f"tests/{folder}/test_{name}"
    mine = (tree / own).exists() and any(own.startswith(test) for test in tests)
    path.write_text(whole.replace(mutant.text, mutant.instead))
    try:
        return (run(tree, [own]) if mine else None) or run(tree, tests)
    finally:
        path.write_text(whole)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="words, of which a file or description has one"
    )
    parser.add_argument("--passing", action="store_true", help="the tests are known to pass as things are")
    parser.add_argument("--list", action="store_true", help="print the mistakes, run nothing")
    options = parser.parse_args()
    if wrong := misplaced(MUTANTS):
        sys.exit("These mistakes cannot be planted; mend them in benchmarks/mutants.py:\n" + "\n".join(wrong))
    chosen = [m for m in MUTANTS if any(word in f"{m.file} {m.what}" for word in options.only)]
    if options.list:
        print("\n".join(f"{mutant.file:20} {mutant.what}" for mutant in chosen))
        return
    tests = list(options.tests)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        if not options.passing and (failed := run(tree, tests)):
            sys.exit(f"Without any mistake {failed} fails; the tests must pass first")
        print("| file | mistake | caught by |\n|---|---|---|")
        missed = 0
        for mutant in chosen:
            test = caught(mutant, tree, tests)
            missed += test is None
            print(f"| {mutant.file} | {mutant.what} | {test or '**nothing**'} |", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} mistakes are caught.")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
