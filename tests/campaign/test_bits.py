"""One changed bit anywhere in a file: refused in one line, or the same numbers as before; never other numbers."""

import io
import json
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miras.cli import main
from miras.data.tokens import ByteTokenizer
from miras.nn.folder import save_model
from miras.nn.lm import LM
from miras.train.checkpoint import checkpoints
from miras.zoo import preset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FLIPS = 60
OF_TRAINING = 20  # a training takes longer than a reading
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "chunk_size": 4, "window_size": 8}
TRAIN = [
    "train",
    "--out",
    "run",
    "--text",
    "text.tar",
    "--cache",
    "cache",
    "--batch-size",
    "1",
    "--seq-len",
    "16",
]
TRAIN += ["--hidden-size", "16", "--num-hidden-layers", "1", "--num-heads", "2", "--window-size", "8"]
TRAIN += ["--num-persistent", "2", "--chunk-size", "4", "--threads", "1"]


def newest() -> Path:
    return checkpoints(Path("run"))[-1]


STREAM = "stream model text.txt --save-state out.state --load-state a.state"
KINDS: dict[str, tuple[Callable[[], Path], list[str]]] = {
    "model.safetensors": (lambda: Path("model/model.safetensors"), STREAM.split()),
    "config.json": (lambda: Path("model/config.json"), STREAM.split()),
    "tokenizer.json": (lambda: Path("model/tokenizer.json"), STREAM.split()),
    "checksums.json": (lambda: Path("model/checksums.json"), STREAM.split()),
    "a stream's state": (lambda: Path("a.state"), STREAM.split()),
    "a session": (lambda: Path("s.miras"), ["session", "recall", "s.miras"]),
    "a session's header": (lambda: Path("s.miras"), ["session", "list", ".", "--json"]),
    "training.json": (lambda: newest() / "training.json", [*TRAIN[:3], "--resume", "--steps", "4"]),
    "training.safetensors": (
        lambda: newest() / "training.safetensors",
        [*TRAIN[:3], "--resume", "--steps", "4"],
    ),
    "tokens": (lambda: next(Path("cache").glob("*.tokens")), [*TRAIN[:3], "--resume", "--steps", "4"]),
    "tokens' header": (lambda: next(Path("cache").glob("*.json")), [*TRAIN[:3], "--resume", "--steps", "4"]),
    "a tar's headers": (
        lambda: Path("text.tar"),
        [*TRAIN, "--steps", "1", "--out", "other", "--cache", "new"],
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        torch.manual_seed(0)
        model = LM(preset("titans-mag", num_persistent=2, **SIZES))  # pyright: ignore
        save_model(model, "model", ByteTokenizer().files())
        Path("text.txt").write_bytes(b"The memory learns while it reads. " * 6)
        with tarfile.open("text.tar", "w") as archive:
            for name in ("a", "b", "c"):
                member = tarfile.TarInfo(name)
                member.size = 120
                archive.addfile(member, io.BytesIO(name.encode() * 120))
        assert main(["session", "new", "s.miras", "model"]) == 0
        assert main(["session", "feed", "s.miras", "text.txt"]) == 0
        assert main(["stream", "model", "text.txt", "--save-state", "a.state"]) == 0
        assert main([*TRAIN, "--steps", "2"]) == 0
    return place


def numbers(command: list[str], out: str) -> object:
    """What a command brought, without times and speeds."""
    if command[0] == "train":
        there = Path("other" if "other" in command else "run")
        rows = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()]
        return [{n: x for n, x in row.items() if n not in ("time", "seconds")} for row in rows]
    return re.sub(r"[\d,]+ tokens/s|saved to .*", "", out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_bit(
    kind: str, whole: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    import shutil

    where, command = KINDS[kind]
    rng = random.Random(kind)

    def tried(place: Path, flip: bool) -> tuple[int, object, str]:
        shutil.copytree(whole, place)
        monkeypatch.chdir(place)
        file = where()
        if flip:
            data = bytearray(file.read_bytes())
            header = 8 + int.from_bytes(data[:8], "little")
            # Half of the bits in the header, where a file has one that is small beside it.
            end = header if kind == "a session's header" else len(data)
            at = rng.randrange(end)
            if kind == "a tar's headers":
                at = rng.choice((0, 1024, 2048)) + rng.randrange(512)
            data[at] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        capsys.readouterr()
        status = main(command)
        out, err = capsys.readouterr()
        found = numbers(command, out) if status == 0 else None
        shutil.rmtree(place)
        return status, found, err

    wanted = tried(tmp_path / "calm", flip=False)
    assert wanted[0] == 0
    refused = same = 0
    flips = OF_TRAINING if command[0] == "train" else FLIPS
    for flip in range(flips):
        status, found, err = tried(tmp_path / str(flip), flip=True)
        if status == 2:
            refused += 1
            assert err.splitlines()[-1].startswith("miras: ") and "Traceback" not in err, err
        elif kind == "a session's header" and '"error"' in str(found):
            refused += 1
        elif kind == "a tar's headers" and found != wanted[1]:
            raise AssertionError("another text, in silence")
        else:
            assert (status, found) == wanted[:2], (flip, status, err)
            same += 1
    print(f"\n| changed bits: {kind} | {flips} flips | {refused} refused, {same} harmless, 0 other numbers |")
