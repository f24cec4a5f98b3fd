"""The page to explore surprise in: what it holds, what it costs, what it refuses, and how it answers in a browser."""

import base64
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from chromium import BYTES, CHROMIUM, Tab, chromium
from miras.cli import main
from miras.core.observe import observe
from miras.data.novel import load_novel
from miras.data.tokens import ByteTokenizer, load_tokenizer
from miras.nn.folder import save_model
from miras.nn.lm import LM
from miras.report import explorer
from miras.report.explorer import (
    Track,
    Watched,
    agreement,
    coded,
    heat,
    page_data,
    rank_correlation,
    shortened,
    tracks_of,
)
from miras.report.frame import render
from miras.report.text import visible
from miras.report.watch import spelled, watch
from miras.stream import read, save_state
from miras.zoo import preset

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 8}
NASTY = (
    "</script><b>bold</b><!-- & &amp; \"q\" 'x' </style>\n\x01\x1b[31m \x7f \u202eexe.gnp\u202c\ttab\r\n"
    "🦉 👨\u200d👩\u200d👧 e\u0301 日本\nשלום עולם مرحبا بالعالم\n\n\u2028end\ufeff"
)


def build(name: str = "titans-mag", seed: int = 0, **options: Any) -> LM:
    window = {"window_size": 16, "num_persistent": 4} if name == "titans-mag" else {}
    torch.manual_seed(seed)
    return LM(preset(name).changed(SIZES | window | options))


STEPS = 24


def page_of(watched: Watched, tracks: Sequence[Track] = (), *, says: str = "a page") -> str:
    """The page of some tracks, or of those that fit; every text on it is `says`."""
    data = page_data(watched, tracks or tracks_of(watched))
    facts, notes = [(says, says, says)], [says]
    return render("surprise.html", title=says, facts=facts, data=data, notes=notes, plain="", command=says)


def noise(count: int, layers: int = 2, heads: int = 2, piece: str = "") -> Watched:
    """What a model could have given: numbers without any order, so that nothing is easy to pack."""
    rng = np.random.default_rng(5)

    def draw(*shape: int) -> NDArray[np.float32]:
        return np.exp(rng.normal(0, 0.7, shape)).astype(np.float32)

    names = ("momentary", "accumulated", "lr", "momentum", "forget", "weight", "loss")
    words = load_novel().heldout[: 10 * count].decode().split(" ")
    text = (
        [piece or w for w in words[:count]] if piece else list(load_novel().heldout[:count].decode("latin-1"))
    )
    bits = draw(count)
    bits[0] = np.nan
    return Watched(
        text[:count], bits, {n: {name: draw(heads, count) for name in names} for n in range(layers)}
    )


@dataclass(frozen=True)
class Unpacked:
    """What a page holds, read without its script."""

    meta: dict[str, Any]
    pieces: list[str]
    values: dict[tuple[str, int | None, int | None], NDArray[np.float64]]

    @classmethod
    def of(cls, page: str) -> "Unpacked":
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
        assert found
        meta = json.loads(found[1])
        blob = zlib.decompress(base64.b64decode(meta.pop("blob")))
        count = meta["tokens"]
        text = blob[: meta["text"]].decode().encode("utf-16-le")
        at = meta["text"] + 2 * count
        ends = 2 * np.cumsum([0, *np.frombuffer(blob[meta["text"] : at], "<u2")])
        pieces = [text[a:b].decode("utf-16-le") for a, b in pairwise(ends)]
        values = {}
        for track in meta["tracks"]:
            size = math.ceil(count / track["every"])
            codes = np.frombuffer(blob[at : at + size], np.uint8).astype(float)
            at += size
            if "least" in track:
                known = track["least"] + (track["most"] - track["least"]) * codes / 254
            else:
                known = track["floor"] * (track["top"] / track["floor"]) ** ((codes - 1) / 253)
                known[codes == 0] = 0
            known[codes == 255] = np.nan
            values[track["name"], track["layer"], track["head"]] = known
        assert at == len(blob)
        return cls(meta, pieces, values)


def near(found: NDArray[Any], true: NDArray[Any], track: dict[str, Any]) -> bool:
    """Whether values are those of their codes: within half a step, or below the floor."""
    if "least" in track:
        return bool(np.allclose(found, true, atol=(track["most"] - track["least"]) / 500, equal_nan=True))
    step = (track["top"] / track["floor"]) ** (0.5 / 253)
    low = (found == 0) & (true < track["floor"] * (1 + 1e-6))
    ratio = np.divide(found, true, out=np.ones_like(found), where=~low & ~np.isnan(true))
    return bool(
        ((ratio <= step * 1.0001) & (ratio >= 0.9999 / step)).all()
        and (np.isnan(found) == np.isnan(true)).all()
    )


# What the page holds


@pytest.mark.parametrize("name", ["titans-mag", "mamba2", "ttt-linear"])
def test_the_page_holds_what_observe_gives(name: str):
    model, ids = build(name), np.frombuffer(load_novel().heldout[:300], np.uint8).astype(np.int64)
    watched = watch(model, ByteTokenizer(), ids)
    page = Unpacked.of(page_of(watched))
    with observe() as seen:
        losses = read(model, ids).losses[0] / np.log(2)
    assert "".join(page.pieces) == load_novel().heldout[:300].decode()
    tracks = {(t["name"], t["layer"], t["head"]): t for t in page.meta["tracks"]}
    assert near(page.values["predictive", None, None], losses, tracks["predictive", None, None])
    expected = {("predictive", None, None)}
    for n in range(2):
        groups: dict[str, list[NDArray[Any]]] = {}
        for each, x in seen[f"layers.{n}"].items():
            groups.setdefault(each.split(".")[0], []).append(x[0].double().numpy())
        if "momentum" not in groups:  # then nothing accumulates
            del groups["accumulated"]
        for each, parts in groups.items():
            for head in range(2):
                key = (each, n, head)
                expected.add(key)
                assert near(page.values[key], np.mean([p[head] for p in parts], axis=0), tracks[key]), key
    assert page.values.keys() == expected
    assert (
        ("accumulated", 0, 0) in expected if name == "titans-mag" else ("accumulated", 0, 0) not in expected
    )


def test_gates_of_a_longer_text_are_means(monkeypatch: pytest.MonkeyPatch):
    watched = noise(1003)
    monkeypatch.setattr(explorer, "GATE_VALUES", 5000)
    tracks = tracks_of(watched)
    gates = [t for t in tracks if t.name == "lr"]
    assert {t.every for t in gates} == {5} and {t.every for t in tracks if t.name == "momentary"} == {1}
    lr = watched.memories[1]["lr"][0]
    found = next(t for t in gates if (t.layer, t.head) == (1, 0)).values
    assert len(found) == 201
    assert found[3] == pytest.approx(lr[15:20].mean(), rel=1e-5) and found[200] == pytest.approx(
        lr[1000:].mean(), rel=1e-5
    )


@pytest.mark.parametrize(
    "values", [[-3.0, 0.0, 5.0, math.nan], [-1.0], [0.0, 0.0], [math.nan], [1e-9, 1.0, math.inf], [2.0, 2.0]]
)
def test_awkward_values_come_back(values: list[float]):
    track = Track("loss", 0, 0, 1, np.array(values, np.float32))
    watched = Watched(list("x" * len(values)), np.full(len(values), np.nan, np.float32), {})
    page = Unpacked.of(page_of(watched, [track]))
    true = np.where(np.isfinite(track.values), track.values, np.nan).astype(float)
    assert near(page.values["loss", 0, 0], true, page.meta["tracks"][0])
    assert len(coded(track.values)[1]) == len(values)


def test_a_page_of_many_heads_shows_means_then_fewer_layers():
    few, many = noise(2000, layers=12, heads=8), noise(30_000, layers=12, heads=4)
    assert len(tracks_of(few)) == 1 + 12 * 8 * 7
    assert shortened(few, tracks_of(few)) == ""
    tracks = tracks_of(many)
    assert {t.head for t in tracks} == {None}
    assert sorted({t.layer for t in tracks} - {None}) == [0, 2, 4, 6, 7, 9, 11]  # pyright: ignore
    said = shortened(many, tracks)
    assert "layers 0, 2, 4, 6, 7, 9, 11 of 12 and means over heads" in said and "--layers" in said
    page = Unpacked.of(page_of(many, tracks[:2]))
    assert near(
        page.values["momentary", 0, None], many.memories[0]["momentary"].mean(0), page.meta["tracks"][1]
    )
    # Layers that were asked for are all there.
    assert len({t.layer for t in tracks_of(many, thin=False)}) == 13


@pytest.mark.parametrize(("layers", "heads", "piece"), [(2, 2, ""), (12, 8, "")], ids=["small", "deep"])
def test_fifty_thousand_tokens_take_well_under_a_megabyte(layers: int, heads: int, piece: str):
    size = len(page_of(noise(50_000, layers, heads, piece)).encode())
    assert size < 720_000


def test_words_of_fifty_thousand_tokens_take_under_a_megabyte():
    text = [f" {w}" for w in load_novel().train.decode().split(" ")[:50_000]]
    watched = noise(50_000)
    size = len(page_of(Watched(text, watched.bits, watched.memories)).encode())
    assert size < 880_000


def test_text_is_escaped_and_comes_back_as_it_was():
    page = page_of(Watched(list(NASTY), np.ones(len(NASTY), np.float32), {}))
    shown = "".join(Unpacked.of(page).pieces)
    assert shown == visible(NASTY).replace("\u202e", "⇄").replace("\u202c", "⇄")
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in data and page.count("<script") == 2 and "<b>bold" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page)
    few = noise(9)
    few.memories[0]["</script><b>"] = few.memories[0].pop("lr")  # a gate of someone's own rule
    titled = page_of(few, says=NASTY)
    assert titled.count("<script") == titled.count("</script") == 2 and titled.count("</style>") == 1


def test_the_page_asks_for_nothing_and_lets_only_its_own_script_run():
    page = page_of(noise(50))
    assert "default-src 'none'" in page and re.search(r"script-src 'sha256-[\w+/=]{44}'", page)
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    assert script and not re.search(r"fetch\(|XMLHttpRequest|import\(|eval\(|innerHTML", script[1])
    addresses = set(re.findall(r"https?://[\w./]+", page))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}


def test_the_same_reading_gives_the_same_page():
    model, ids = build(), np.frombuffer(load_novel().heldout[:200], np.uint8).astype(np.int64)
    pages = [page_of(watch(model, ByteTokenizer(), ids)) for _ in range(2)]
    assert pages[0] == pages[1]


def test_stripes_are_means_on_the_scale_of_the_text():
    values = np.repeat(np.array([20, 100, 200, 400, 1000, math.nan], np.float32), 10)
    shares, every = heat(values, 6)
    assert every == 10 and len(shares) == 6 and shares[-1] == 0
    assert shares[0] < shares[3] < shares[4] == 1 and all(0 <= share <= 1 for share in shares)
    assert heat(np.zeros(7, np.float32), 3) == ([0.0, 0.0, 0.0], 3)


def test_rank_correlation_is_spearman_s():
    a = [0.1, 5.0, 2.0, 2.0, 9.0]
    assert rank_correlation(a, [x**3 for x in a]) == pytest.approx(1)
    assert rank_correlation(a, [-x for x in a]) == pytest.approx(-1)
    # By hand: ranks 1 4 2.5 2.5 5 against 3 1 2 5 4.
    ranks = np.corrcoef([1, 4, 2.5, 2.5, 5], [3, 1, 2, 5, 4])[0, 1]
    assert rank_correlation(a, [3.0, 1.0, 2.0, 5.0, 4.0]) == pytest.approx(ranks)
    assert math.isnan(rank_correlation(a, [1.0] * 5))


def test_the_page_says_how_far_the_memories_go_with_the_model():
    watched = noise(400)
    watched.memories[1]["momentary"][1] = 3 * np.nan_to_num(watched.bits)
    mean = np.mean([seen["momentary"].mean(0) for seen in watched.memories.values()], axis=0)
    expected = rank_correlation(watched.bits[1:], mean[1:])  # nothing predicted the first token
    assert f"momentary {expected:+.2f}, accumulated" in agreement(watched)
    assert agreement(Watched(watched.pieces, watched.bits, {})) == ""


# Tokens as text


def test_bytes_that_spell_one_character_wait_for_the_last():
    ids = ByteTokenizer().encode("a🦉é")
    assert spelled(ByteTokenizer(), ids) == ["a", "", "", "", "🦉", "", "é"]
    cut = spelled(ByteTokenizer(), ByteTokenizer().encode("ab🦉")[:-1])
    assert cut[:2] == ["a", "b"] and "".join(cut) == "ab\ufffd"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 300 tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([load_novel().heldout[:20_000].decode()], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    backend.save(str(path))
    return path


def test_pieces_of_words_join_to_the_text(bpe: Path):
    tokenizer = load_tokenizer(bpe)
    text = load_novel().heldout[:500].decode() + NASTY
    ids = tokenizer.encode(text)
    pieces = spelled(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text and max(map(len, pieces)) > 1


# The command


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, bpe: Path) -> Path:
    """Models and texts; nothing writes to it."""
    folder = tmp_path_factory.mktemp("shared")
    save_model(build(), folder / "model")
    save_model(build("transformer", chunk_size=16), folder / "plain")
    save_model(build(vocab_size=300), folder / "words")
    (folder / "words" / "tokenizer.json").write_bytes(bpe.read_bytes())
    save_model(build(), folder / "foreign")
    (folder / "foreign" / "tokenizer.json").write_bytes(bpe.read_bytes())
    (folder / "text.txt").write_bytes(load_novel().heldout[:400])
    (folder / "text.html").write_bytes(b"<!DOCTYPE html>\n<title>a text</title>")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "nul.txt").write_bytes(b"text\0text")
    (folder / "junk.txt").write_bytes(bytes(range(128, 255)) * 3)
    model = build()
    ids = torch.from_numpy(ByteTokenizer().encode(load_novel().heldout[400:500]))
    save_state(folder / "state", read(model, ids).state, model)
    save_state(folder / "two", read(model, ids.view(2, -1)).state, model)
    return folder


def report(place: Path, line: str) -> int:
    words = [str(place / w[1:]) if w.startswith("@") else w for w in line.split()]
    return main(["report", "surprise", *words, "--threads", "1"])


def test_the_command_writes_a_page(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "page.html"
    assert report(shared, f"@model @text.txt --tokens 300 --layers 1 --out {out}") == 0
    said = capsys.readouterr().out
    assert said.startswith("300 tokens (the text is longer") and str(out) in said
    page = Unpacked.of(out.read_text(encoding="utf-8"))
    assert "".join(page.pieces) == load_novel().heldout[:300].decode()
    assert {layer for _, layer, _ in page.values} == {None, 1}
    assert math.isnan(page.values["predictive", None, None][0])
    assert list(out.parent.iterdir()) == [out]


def test_a_reading_goes_on_from_a_saved_state(shared: Path, tmp_path: Path):
    out = tmp_path / "page.html"
    assert report(shared, f"@model @text.txt --tokens 50 --load-state @state --out {out}") == 0
    page = Unpacked.of(out.read_text(encoding="utf-8"))
    assert page.meta["before"] == 100 and not np.isnan(page.values["predictive", None, None]).any()


def test_pieces_of_words_and_models_without_memory_have_pages_too(shared: Path, tmp_path: Path):
    out = tmp_path / "page.html"
    assert report(shared, f"@words @text.txt --out {out}") == 0
    page = Unpacked.of(out.read_text(encoding="utf-8"))
    assert "".join(page.pieces) == load_novel().heldout[:400].decode() and page.meta["tokens"] < 400
    assert report(shared, f"@plain @text.txt --out {out}") == 0
    plain = out.read_text(encoding="utf-8")
    assert list(Unpacked.of(plain).values) == [("predictive", None, None)]
    assert "none</b> <span>predictive surprise only" in plain


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("@model @missing.txt", "No such file"),
        ("@model @empty.txt", "is empty"),
        ("@model @nul.txt", "has NUL bytes"),
        ("@model @junk.txt", "is not text: much of it is not UTF-8"),
        ("@nothing @text.txt", "nothing"),
        ("@foreign @text.txt", "its tokenizer.json has 300 ids, the model only 256"),
        ("@model @text.txt --layers 2", "layers with a memory: 0, 1"),
        ("@plain @text.txt --layers 0", "the model has no memory"),
        ("@model @text.txt --tokens -1", "--tokens must be positive"),
        ("@words @text.txt --load-state @state", "belongs to another model"),
        ("@model @text.txt --load-state @two", "holds 2 streams"),
        ("@model @text.txt --out @model", "is a folder"),
        ("@model @text.txt --out @text.txt", "exists and is not a page of miras"),
        ("@model @text.html --out @text.html", "exists and is not a page of miras"),
        ("@model @text.txt --out @text.txt/page.html", "cannot be written"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
):
    out = tmp_path / "page.html"
    assert report(shared, line if "--out" in line else f"{line} --out {out}") == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("miras: ") and error.count("\n") == 1 and said in error
    assert not list(tmp_path.iterdir()) and (shared / "text.txt").stat().st_size == 400


def test_a_stop_leaves_no_page(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("miras.report.run.watch", stopped)
    assert report(shared, f"@model @text.txt --out {tmp_path / 'page.html'}") == 130
    assert "no page was written" in capsys.readouterr().err and not list(tmp_path.iterdir())


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("no chromium executable")
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Unpacked]:
    """A page of 3,000 tokens, and what it holds."""
    page = page_of(noise(3000))
    path = tmp_path_factory.mktemp("pages") / "novel.html"
    path.write_text(page, encoding="utf-8")
    return path, Unpacked.of(page)


def now(tab: Tab) -> int:
    """The place that the strip names."""
    return int(tab.run("document.getElementById('strip').getAttribute('aria-valuenow')"))


def current_is_seen(tab: Tab) -> bool:
    return tab.run(
        "(() => { const c = document.querySelectorAll('#ink .current'), f = ink.getBoundingClientRect(); "
        "if (c.length !== 1) return false; const b = c[0].getBoundingClientRect(); "
        "return b.top >= f.top - 1 && b.bottom <= f.bottom + 1; })()"
    )


def levels(values: NDArray[Any]) -> NDArray[np.int64]:
    """The step of the colour scale of each value: 5 % to 99.5 % quantile, at most two decades."""
    known = values[np.isfinite(values)]
    high = np.quantile(known, 0.995)
    low = max(np.quantile(known, 0.05), high / 100)
    with np.errstate(divide="ignore"):
        rank = STEPS * np.log(values / low) / np.log(high / low)
    return np.clip(np.floor(rank), 0, STEPS - 1).astype(int)


def painted(tab: Tab) -> list[int]:
    """The step of the colour of each token near the view, -1 where nothing was measured."""
    tab.frame()
    return tab.run(
        "[...document.querySelectorAll('#ink i')].map((e) => e.classList.contains('unknown') ? -1 : "
        f"Math.round({STEPS - 1} * e.style.getPropertyValue('--heat')))"
    )


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (320, True)])
def test_it_opens_without_a_complaint_at_any_width(
    tab: Tab, novel: tuple[Path, Unpacked], width: int, dark: bool
):
    tab.open(novel[0], width=width, dark=dark)
    tab.run("document.getElementById('every').open = true")
    tab.frame()
    assert tab.complaints == [] and tab.run("document.documentElement.scrollWidth") == width
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (
        tab.run(BYTES + "return light(getComputedStyle(document.body).backgroundColor); })()") < 0.1
    ) is dark
    tab.click("#theme")
    assert tab.run("getComputedStyle(document.body).backgroundColor") != paper
    tab.run("localStorage.clear()")


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_stands_out_from_what_is_behind_it(tab: Tab, novel: tuple[Path, Unpacked], dark: bool):
    tab.open(novel[0], dark=dark)
    assert tab.faint() == []


@pytest.mark.parametrize("dark", [False, True])
def test_colours_deepen_with_surprise_and_can_be_read_on(tab: Tab, novel: tuple[Path, Unpacked], dark: bool):
    tab.open(novel[0], dark=dark)
    behind, ratios, colours = tab.run(
        BYTES
        + f"""
    const style = (k) => getComputedStyle(document.body.appendChild(
      make('mark', {{ class: 'heat', style: `--heat:${{k / {STEPS - 1}}}` }})));
    const all = Array.from({{ length: {STEPS} }}, (_, k) => style(k));
    return [all.map((s) => light(s.backgroundColor)), all.map((s) => contrast(s.color, s.backgroundColor)),
      new Set(all.map((s) => bytes(s.backgroundColor).join())).size]; }})()"""
    )
    assert min(ratios) >= 4.5 and colours == STEPS
    assert behind == sorted(behind, reverse=not dark)


def test_everything_that_takes_the_focus_has_a_name(tab: Tab, novel: tuple[Path, Unpacked]):
    tab.open(novel[0])
    nodes = tab.tell("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        n
        for n in nodes
        if any(p["name"] == "focusable" and p["value"]["value"] for p in n.get("properties", []))
    ]
    named = {n["role"]["value"]: n["name"]["value"] for n in focusable if n["name"]["value"].strip()}
    unnamed = [n for n in focusable if not n["name"]["value"].strip() and n["role"]["value"] != "RootWebArea"]
    assert unnamed == [] and {"slider", "application", "radio", "combobox", "button"} <= named.keys()
    roles = {n["role"]["value"] for n in nodes}
    assert {"main", "banner", "contentinfo", "complementary", "heading"} <= roles


def test_kind_layer_and_head_choose_the_colours(tab: Tab, novel: tuple[Path, Unpacked]):
    path, page = novel
    tab.open(path)

    def pick(control: str, value: str) -> None:
        tab.run(
            f"(() => {{ const s = document.getElementById('{control}'); s.value = '{value}'; "
            "s.dispatchEvent(new Event('change')); })()"
        )

    def expected(*key: Any) -> NDArray[np.int64]:
        name, layer, head = key
        heads = [head] if head != "mean" else [0, 1]
        return levels(np.mean([page.values[name, layer, h] for h in heads], axis=0))

    seen: list[list[int]] = []

    def check(*key: Any) -> None:
        found = painted(tab)
        got = np.array(found)
        true = expected(*key)[: len(got)]
        known = got >= 0
        assert len(got) > 1000 and np.abs(got - true)[known].max() <= 1
        assert (got == true)[known].mean() > 0.97
        assert found not in seen
        seen.append(found)

    check("momentary", 0, "mean")
    pick("head", "1")
    check("momentary", 0, 1)
    pick("layer", "1")
    check("momentary", 1, 1)
    tab.click("#kinds label:nth-of-type(3)")
    check("accumulated", 1, 1)
    pick("head", "")
    check("accumulated", 1, "mean")
    tab.click("#kinds label:nth-of-type(1)")
    pick("head", "0")
    first, *rest = painted(tab)
    assert first == -1  # nothing predicted the first token
    got = np.array(rest)
    true = levels(page.values["predictive", None, None][1:])[: len(got)]
    assert np.abs(got - true).max() <= 1 and (got == true).mean() > 0.97
    assert "bits" in tab.run("document.getElementById('quantiles').textContent")


def test_the_strip_jumps_by_click_and_by_key(tab: Tab, novel: tuple[Path, Unpacked]):
    tab.open(novel[0])
    assert now(tab) == 1 and current_is_seen(tab)
    tab.click("#strip", 0.75)
    assert abs(now(tab) - 2250) < 10 and current_is_seen(tab)
    top = tab.run("ink.scrollTop")
    assert top > 500
    said = tab.run("document.getElementById('strip').getAttribute('aria-valuetext')")
    assert f"token {now(tab):,} of 3,000" in said and "gradient norm" in said
    place = now(tab)
    tab.press("ArrowRight")
    assert now(tab) == place + 15
    tab.press("PageDown")
    assert now(tab) == place + 15 - 150
    tab.press("Home")
    assert now(tab) == 1 and tab.run("ink.scrollTop") < top and current_is_seen(tab)
    tab.press("End")
    assert now(tab) == 3000 and current_is_seen(tab)
    # Scrolling by hand takes the place along.
    tab.run("ink.scrollTop = 0")
    tab.frame()
    tab.frame()
    assert now(tab) < 1500 and current_is_seen(tab)


def test_the_text_answers_to_keys_and_peaks_are_peaks(tab: Tab, novel: tuple[Path, Unpacked]):
    path, page = novel
    tab.open(path)
    tab.run("ink.focus()")
    tab.press("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight")
    assert now(tab) == 3
    said = tab.run("document.getElementById('say').textContent")
    assert said.startswith(f"{page.pieces[2]}, token 3 of 3,000: Momentary surprise |grad| ")
    tab.press("ArrowDown")
    below = now(tab)
    assert 10 < below < 300
    tab.press("ArrowUp")
    assert now(tab) < below
    tab.press("Home")
    assert now(tab) == 1
    tab.press("PageDown")
    assert now(tab) > below and current_is_seen(tab)
    values = np.mean([page.values["momentary", 0, h] for h in (0, 1)], axis=0)
    found = []
    for _ in range(3):
        tab.press("n")
        found.append(now(tab) - 1)
        assert values[found[-1]] == values[max(0, found[-1] - 20) : found[-1] + 21].max()
        assert values[found[-1]] >= np.quantile(values, 0.979) and current_is_seen(tab)
    assert found == sorted(set(found))
    tab.press("p")
    assert now(tab) - 1 == found[1]
    tab.click("#next")
    assert now(tab) - 1 == found[2]
    tab.click("#moments li:first-child button")
    assert now(tab) - 1 == int(values.argmax())


def test_every_value_of_a_token_can_be_read(tab: Tab, novel: tuple[Path, Unpacked]):
    path, page = novel
    tab.open(path)
    tab.run("document.getElementById('every').open = true; ink.focus()")
    tab.press("ArrowRight", "ArrowRight")
    rows = tab.run(
        "[...document.querySelectorAll('#table tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    heads = tab.run("[...document.querySelectorAll('#table thead th')].map((c) => c.textContent)")
    assert heads[:4] == ["layer", "head", "momentary", "accumulated"] and len(rows) == 6
    for layer, head, momentary, accumulated, step, *_ in rows:
        which = [0, 1] if head == "mean" else [int(head)]
        for cell, name in ((momentary, "momentary"), (accumulated, "accumulated"), (step, "lr")):
            true = np.mean([page.values[name, int(layer), h][2] for h in which])
            assert float(cell.replace(",", "")) == pytest.approx(true, rel=6e-3)
    shown = dict(
        tab.run(
            "[...document.querySelectorAll('#values div')].map((d) => [...d.children].map((c) => c.textContent))"[
                :-1
            ]
            + ".slice(0, 2))"
        )
    )
    assert float(shown["Predictive surprise"]) == pytest.approx(
        page.values["predictive", None, None][2], rel=6e-3
    )
    kept = 1 - np.mean([page.values["forget", 0, h][2] for h in (0, 1)])
    assert float(shown["Retention, 1 − forget"]) == pytest.approx(kept, abs=1e-4)
    assert tab.run("document.querySelectorAll('#gate-charts svg[role=img]').length") == 5
    said = tab.run("document.querySelector('#gate-charts [data-name=lr] svg').getAttribute('aria-label')")
    assert said.startswith("Step taken, lr. along the text: from ")


def test_fifty_thousand_tokens_open_at_once_and_all_are_there(tab: Tab, tmp_path: Path):
    path = tmp_path / "long.html"
    watched = noise(50_000)
    path.write_text(page_of(watched), encoding="utf-8")
    assert tab.open(path) < 2
    assert tab.run("document.querySelectorAll('#ink i').length") < 8000
    assert tab.run("ink.textContent") == "".join(visible(p) for p in watched.pieces)
    tab.click("#strip", 0.9)
    spent = tab.run(
        "(async () => { let most = 0; for (let k = 0; k < 20; k++) { ink.scrollTop -= 400; const began = "
        "performance.now(); await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))); "
        "most = Math.max(most, performance.now() - began); } return most; })()"
    )
    assert spent < 500 and tab.run("document.querySelectorAll('#ink i').length") < 12_000


def test_a_browser_that_cannot_colour_the_text_says_so(tab: Tab, novel: tuple[Path, Unpacked]):
    tab.open(novel[0])
    assert tab.run("document.getElementById('status').hidden")
    old = tab.tell("Page.addScriptToEvaluateOnNewDocument", source="CSS.supports = () => false")
    tab.open(novel[0])
    tab.tell("Page.removeScriptToEvaluateOnNewDocument", **old)
    said = tab.run(
        "[document.getElementById('status').checkVisibility(), document.getElementById('status').innerText]"
    )
    assert said[0] and "too old to colour" in said[1] and tab.run("ink.textContent.length") > 1000


def test_hostile_text_is_only_text(tab: Tab, tmp_path: Path):
    path = tmp_path / "nasty.html"
    pieces = spelled(ByteTokenizer(), ByteTokenizer().encode(NASTY))
    count = len(pieces)
    path.write_text(page_of(Watched(pieces, np.arange(1, count + 1, dtype=np.float32), {})), encoding="utf-8")
    tab.open(path)
    assert tab.complaints == []
    assert tab.run("ink.textContent") == visible(NASTY).replace("\u202e", "⇄").replace("\u202c", "⇄")
    assert tab.run("ink.querySelectorAll('script, img, style').length + document.scripts.length") == 2
    assert tab.run("document.getElementById('no-memory').hidden") is False
    owl = len(NASTY.partition("🦉")[0].encode())
    tab.run("ink.focus()")
    tab.press(*["ArrowRight"] * (owl + 1))
    assert tab.run("document.getElementById('sign').textContent") == "🦉"
    assert "2 of the 4 that spell it" in tab.run("document.getElementById('place').textContent")
