"""A model's blocks run where their tensors are: below the call no number goes to the host, and all is made in place.

Three devices that every machine has: the CPU, watched for reads by the host; meta, where a tensor of another device
shows at once; and one that is no processor's, whose tensors are fake, for what an accelerator would refuse.
"""

import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import miras
from miras.nn.config import ModelConfig
from miras.nn.lm import LM, Block
from miras.zoo import preset, presets

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_heads": 2,
    "window_size": 4,
    "segment_size": 4,
    "num_persistent": 2,
}


def small(name: str, **changed: Any) -> ModelConfig:
    """A preset with one layer of each of its kinds."""
    made = preset(name)
    more = {"num_hidden_layers": len(made.pattern), "chunk_size": min(2, made.stride())}
    return made.changed(SIZES | more | changed)


CASES = {name: small(name) for name in presets()} | {
    "titans-mac-pooled": small("titans-mac", pool=2),
    "deltanet-mapped": small("deltanet", key_dim=3, feature_map=miras.Polynomial()),
}
MIXED = ("swa-lmm", "moneta-h", "yaad-h", "memora-h")  # of layers that other presets have alone
every = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in MIXED)) for n in CASES]
)

SOURCE = Path(miras.__file__).parent


def text(rows: int, T: int, device: str = "cpu") -> Tensor:
    return (torch.arange(rows * T).view(rows, T) * 7 % 31).to(device)


def chosen(*rows: list[int], T: int) -> Tensor:
    """A mask (B, T) that is True at the places given for each row."""
    found = torch.zeros(len(rows), T, dtype=torch.bool)
    for row, places in enumerate(rows):
        found[row, places] = True
    return found


CALLS: dict[str, list[tuple[int, dict[str, Tensor]]]] = {
    "plain": [(8, {})],
    "in pieces": [(5, {}), (1, {}), (4, {"write": ~chosen([0, 1], [2], T=4)})],
    "packed": [(8, {"reset": chosen([3, 4], [0, 7], T=8)})],
    "ragged": [(8, {"valid": ~chosen([5, 6, 7], [0, 3], T=8)}), (4, {})],
}
"""Calls of one stream of two rows: how many tokens, and the masks."""


def our(frames: traceback.StackSummary) -> str:
    """The innermost two lines of miras' own, the inner one first."""
    lines = [
        f"{Path(f.filename).relative_to(SOURCE)}:{f.lineno}"
        for f in frames
        if Path(f.filename).is_relative_to(SOURCE)
    ]
    return " < ".join(reversed(lines[-2:]))


@contextmanager
def below(model: nn.Module, entered: Callable[[], Any], left: Callable[[], Any]) -> Iterator[None]:
    """`entered` and `left` are called around the forward pass of every block."""
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    hooks = [block.register_forward_pre_hook(lambda *_: entered()) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: left(), always_call=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stream(model: LM, calls: list[tuple[int, dict[str, Tensor]]]) -> Tensor:
    """The sum of all that calls of one stream give, logits and the last state."""
    device = str(model.lm_head.weight.device)
    state, total = None, torch.zeros((), device=device)
    for T, masks in calls:
        masks = {n: mask.to(device) for n, mask in masks.items()}
        logits, state = model(text(2, T, device), state, **masks)
        total = total + logits.sum()
    return total + sum(x.sum() for x in state.tensors().values() if x.is_floating_point())


class Watch(TorchDispatchMode):
    """Looks at every operation of the blocks and of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.kind = False, ""
        self.found: Counter[str] = Counter()

    def seen(self, func: Any, args: Any, out: Any) -> str | None:
        """What is wrong with an operation, or None."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside and (wrong := self.seen(func, args, out)):
            self.note(wrong)
        return out

    def note(self, what: str) -> None:
        """Where something happened that should not, in our words or in autograd's."""
        if self.inside:
            node = torch._C._current_autograd_node()
            place = our(traceback.extract_stack()) or (node.name() if node else "backward")
            self.found[f"{self.kind}: {place}: {what}"] += 1

    def run(self, kind: str, model: LM) -> None:
        """Watch calls of one stream, and the backward pass of all that they give."""
        self.kind = kind
        with self, below(model, self.enter, self.leave):
            total = stream(model, CALLS[kind])
            self.enter()
            total.backward()
            self.leave()

    def enter(self) -> None:
        self.inside = True

    def leave(self) -> None:
        self.inside = False

    def told(self) -> str:
        return "\n".join(f"  {place} x {count}" for place, count in self.found.items())


WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
"""Operations that the host waits for."""


class Reads(Watch):
    """Finds what the host reads: numbers, and shapes that depend on numbers; and the numbers that it sends."""

    def seen(self, func: Any, args: Any, out: Any) -> str | None:
        tags = func.tags
        by_number = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
        if "aten::index" in func.name():  # by places, or by a mask whose number of them is not known
            leaves = tree_leaves(args[1])
            by_number = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in leaves)
        sent = (
            func is torch.ops.aten.lift_fresh.default
        )  # what `torch.tensor` has made of a number of the host
        return str(func) if by_number or sent else None


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """A watch that also sees the reads of a CPU tensor that are no operation."""
    watch = Reads()
    for name in ("tolist", "numpy", "__array__", "cpu"):
        whole = getattr(Tensor, name)

        def noted(self: Tensor, *args: Any, name: str = name, whole: Any = whole, **kwargs: Any) -> Any:
            watch.note(name)
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, noted)
    return watch


def hidden(model: LM) -> Counter[str]:
    """What torch's own derivatives read where no mode is watching, as that of a product does."""
    total = stream(model, CALLS["plain"])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        total.backward()
    names = Counter(event.name() for event in seen.profiler.kineto_results.events())
    return Counter({f"plain: in the backward pass: {name}": names[name] for name in WAITING if names[name]})


@every
def test_no_number_is_read_below_the_call(name: str, reads: Reads) -> None:
    torch.manual_seed(0)
    model = LM(CASES[name])
    for kind in CALLS:
        reads.run(kind, model)
    reads.found.update(hidden(model))
    assert not reads.found, f"the host reads numbers of tensors below the model's call:\n{reads.told()}"


class Elsewhere(Watch):
    """Finds tensors that are made on another device than meta."""

    def seen(self, func: Any, args: Any, out: Any) -> str | None:
        away = {x.device.type for x in tree_leaves(out) if isinstance(x, Tensor)} - {"meta"}
        return f"{func} gives a tensor on {', '.join(away)}" if away else None


@every
def test_all_is_made_where_the_inputs_are(name: str) -> None:
    with torch.device("meta"):
        model = LM(CASES[name])
    watch = Elsewhere()
    for kind in ("plain", "in pieces"):  # masks are numbers, which a call has to know
        watch.run(kind, model)
    assert not watch.found, f"not everything below the model's call is on meta:\n{watch.told()}"
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def on_another_device() -> dict[str, str]:
    """Of every case, what goes wrong in training on a device that is neither CPU nor meta, or "".

    Its tensors have a device and no numbers, as tensors of a GPU have for a host that must not wait for them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("elsewhere")
    found: dict[str, str] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the parameters, which begin on meta
    for name, config in CASES.items():
        with torch.device("meta"):
            model = LM(config)
        with mode:
            torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` copies from the CPU
            model.to_empty(device="elsewhere")
            try:
                logits, state = model(text(2, 8, "elsewhere"))
                (logits.sum() + sum(x.sum() for x in state.tensors().values())).backward()
                devices = {x.device.type for x in (logits, *(p.grad for p in model.parameters()))}
                found[name] = "" if devices == {"elsewhere"} else f"results are on {devices}"
            except Exception as error:
                found[name] = (
                    f"{our(traceback.extract_tb(error.__traceback__))}: {type(error).__name__}: {error}"
                )
    return found


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """`on_another_device` of a process of its own: a device is registered for good, and torch may abort."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@every
def test_training_on_another_device(name: str, told: dict[str, str]) -> None:
    assert told[name] == ""


if __name__ == "__main__":
    print(json.dumps(on_another_device()), flush=True)
    os._exit(0)  # torch's threads end with the process, and not while it takes down a device that is none
