"""Ctrl-C at every line of a feed and of its save: whole pieces are kept, and all of them once they were read."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from miras.cli import main
from miras.data.tokens import ByteTokenizer
from miras.nn.folder import save_model
from miras.nn.lm import LM
from miras.session.session import Session
from miras.zoo import preset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "chunk_size": 4, "window_size": 8}
POINTS = 80
HOUSE = str(Path(sys.modules["miras"].__file__ or "").parent)


def interrupted(count: int, work: Any) -> tuple[int, int]:
    """Run with two Ctrl-C at the count-th line of our code behind the load: (status, lines seen)."""
    seen, armed = 0, False

    def line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if event == "line" and armed:
            seen += 1
            if seen == count:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
        return line

    def call(frame: FrameType, event: str, _: object) -> Any:
        nonlocal armed
        if frame.f_code.co_name == "worked":
            armed = True
        name = frame.f_code.co_filename
        return line if name.startswith(HOUSE) and "/core/" not in name and "/engine/" not in name else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        status = work()
    except KeyboardInterrupt:  # behind the command, where the caller's handlers are back
        status = 130
    finally:
        sys.settrace(before)
    return status, seen


@pytest.mark.parametrize("learn", [False, True])
def test_ctrl_c_at_every_line(learn: bool, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = LM(preset("titans-mag", num_persistent=2, **SIZES))  # pyright: ignore
    save_model(model, "model")
    Path("text").write_bytes(b"The memory learns while it reads. "[:32])
    assert main(["session", "new", "begun.miras", "model"]) == 0
    begun = Path("begun.miras").read_bytes()
    rest = " --learn --segment 8 --lr 1e-2 --replay 2" if learn else " --piece 8"

    def feed(name: str, text: str = "text") -> int:
        Path(name).write_bytes(begun)
        return main(f"session feed {name} {text}{rest}".split())

    def weights(name: str) -> tuple[int, dict[str, torch.Tensor]]:
        session = Session.load(name, model, ByteTokenizer())
        parts = session.now.state.tensors() | {f"delta.{n}": x for n, x in session.now.delta.items()}
        return session.tokens, parts

    whole = {0: {}}
    for tokens in (8, 16, 24, 32):
        Path("part").write_bytes(Path("text").read_bytes()[:tokens])
        assert feed("whole.miras", "part") == 0
        whole[tokens] = weights("whole.miras")[1]
    status, lines = interrupted(-1, lambda: feed("s.miras"))
    assert status == 0
    kept: dict[int, int] = {}
    for count in range(1, lines + 1, max(1, lines // POINTS)):
        status, _ = interrupted(count, lambda: feed("s.miras"))
        assert status in (0, 130) and "Traceback" not in capsys.readouterr().err
        tokens, parts = weights("s.miras")
        kept[tokens] = kept.get(tokens, 0) + 1
        assert tokens in whole
        if tokens:
            assert parts.keys() == whole[tokens].keys()
            assert all(torch.equal(parts[n], x) for n, x in whole[tokens].items()), (count, tokens)
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert not left, (count, left)
    what = "feed --learn" if learn else "feed"
    total = sum(kept.values())
    print(
        f"\n| Ctrl-C twice, `session {what}` | {total} of {lines} lines | tokens kept: {dict(sorted(kept.items()))} |"
    )
