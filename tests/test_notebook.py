"""What a notebook shows: short words for everything that holds many numbers, and a picture where it helps."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import miras
from miras.core.observe import Observation
from miras.data.tokens import prepare


@pytest.fixture(scope="module")
def model() -> miras.LM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "window_size": 8, "num_persistent": 2}
    return miras.LM(miras.preset("titans-mag", chunk_size=4, **sizes))


TEXT = b"a memory that goes on " * 4


def shown_things(model, tmp_path):
    ids = miras.ByteTokenizer().encode(TEXT)
    session = miras.Session(model, miras.ByteTokenizer())
    fed = session.feed(TEXT, "a text", observe=True)
    session.mark("then")
    reading = miras.read(model, np.stack([ids, ids]), observe=True)
    (tmp_path / "text").write_bytes(TEXT)
    (piece,) = miras.read_pieces(model, ids)
    cache = miras.MirasCache(reading.state)
    memory = model.model.layers[0].mixer.memory
    page = miras.surprise_page(model, TEXT)
    file = prepare(tmp_path / "text", miras.ByteTokenizer(), tmp_path)
    return {
        "LMState(1 row, 88 tokens read, 2 layers": model(torch.from_numpy(ids)[None])[1],
        "StreamState(2 rows, 88 tokens read": reading.state,
        "MemoryState(2 rows, ": reading.state.layers[0].memory,
        "Session(model ": session,
        "Fed(88 tokens, loss ": fed,
        "Moment(88 tokens, 1 episodes": session.now,
        "Episode('a text', ": session.now.episodes[0],
        "Reservoir(0 of 0": session.now.past,
        "Observation(2 layers, 1 x 2 heads x 88 tokens; seen['layers.0'] has momentary": fed.seen,
        "Reading(2 x 88 tokens, mean loss ": reading,
        "Piece(1 x 88 tokens from 0": piece,
        "TokenFile(": file,
        "MirasCache(rows=2, length=0)": cache,
        "InitialMemory(w1 (2, 8, 32), w2 (2, 32, 8))": memory.A0,
        "Page(": page,
        "Observation(nothing was seen)": Observation(),
    }


class Balanced(HTMLParser):
    """Fails on a tag that closes another one than the last opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass


def test_everything_is_shown_in_a_line(model, tmp_path):
    for start, thing in shown_things(model, tmp_path).items():
        shown = repr(thing)
        assert shown.startswith(start) and len(shown) < 400 and "\n" not in shown, shown
        if hasattr(thing, "_repr_html_"):
            parser = Balanced()
            parser.feed(thing._repr_html_())
            assert not parser.open


def test_a_state_says_so_when_rows_differ(model):
    ids = torch.zeros(2, 6, dtype=torch.long)
    _, state = model(ids, valid=torch.arange(6) < torch.tensor([[6], [4]]))
    assert "4 to 6 tokens read" in repr(state)
    with torch.device("meta"):
        assert "bytes on meta" in repr(miras.LM(model.config).initial(1))


def test_an_observation_is_a_mapping(model):
    with miras.observe() as seen:
        assert seen and not len(seen)
        model(torch.zeros(1, 6, dtype=torch.long))
    assert list(seen) == ["layers.0", "layers.1"] == list(seen.layers())
    assert "layers.0" in seen and "layers.7" not in seen
    assert {name: values["loss"].shape for name, values in seen.items()} == dict.fromkeys(seen, (1, 2, 6))
    lines = re.findall(r"<polyline", seen._repr_html_())
    assert len(lines) == 2


def test_the_page_of_surprise(model, tmp_path):
    page = miras.surprise_page(model, "ein Text", title="A & B")
    assert page.save(tmp_path / "page.html").read_text() == page.html
    assert "A &amp; B" in page.html and page._repr_html_().startswith("<iframe srcdoc=")
    assert page.save(tmp_path / "page.html").exists()
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(ValueError, match="is not a page of miras"):
        page.save(tmp_path / "mine.html")
    one = miras.surprise_page(model, TEXT, layers=[1])
    assert one.bits_per_byte == pytest.approx(miras.surprise_page(model, TEXT).bits_per_byte)


def test_dir_has_what_there_is_and_nothing_else():
    wanted = {"load_model", "save_model", "ByteTokenizer", "generate", "read", "surprise_page", "__version__"}
    names = set(dir(miras))
    assert wanted < names and not {"Any", "importlib", "TYPE_CHECKING"} & names
    assert all(hasattr(miras, name) for name in names)
