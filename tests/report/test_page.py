"""The report page: well formed, self-contained, safe, complete, readable, and the same after JSON."""

import base64
import hashlib
import html
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from chromium import CHROMIUM, FLAGS
from miras.report import (
    ConditionAverage,
    Curve,
    DemoReport,
    GeneratedText,
    Header,
    HeadlineRow,
    LearningAct,
    ModelCard,
    NeedleAct,
    SurpriseLayer,
    SurprisePage,
    render_report,
    wilson_interval,
    write_report,
)
from miras.report.chart import MAX_POINTS, LineChart, curve_slots, nice_ticks, render_chart, thin
from miras.report.palette import DARK, LEVELS, LIGHT, contrast, luminance, ramp
from miras.report.surprise import MISSING, quantise, render_surprise
from miras.report.text import clusters, duration, number, short_count

VOID = {"meta", "link", "br", "input", "img", "hr"}
NASTY = "<script>alert(1)</script> & \"quoted\" 'single' </style> ünïcödé \u202e🦉 \x00\x1b\ud800 http://a.example/x"


class Page(HTMLParser):
    """Collects the elements, the text and the data tables of a page, and checks that tags balance."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (self.open[-5:], tag, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def count(self, tag: str, **attrs: str) -> int:
        return sum(t == tag and attrs.items() <= a.items() for t, a in self.elements)


@pytest.fixture(scope="module")
def source(report: DemoReport) -> str:
    """The HTML of the full made-up report."""
    return render_report(report)


def with_text(text: str, **kinds: list[float]) -> SurprisePage:
    """A surprise page with the given layers."""
    return SurprisePage(text, [SurpriseLayer(kind, "bits", values) for kind, values in kinds.items()])


def empty_report() -> DemoReport:
    """A report of a run that did nothing."""
    return DemoReport(Header([ModelCard("a model", 10)], "a day"))


def test_the_page_is_well_formed_and_has_one_of_each_landmark(source: str):
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    for tag in ("h1", "main", "header", "footer", "title", "style", "script"):
        if tag != "title":
            assert page.count(tag) == 1, tag
    idents = [a["id"] for _, a in page.elements if "id" in a]
    assert len(idents) == len(set(idents))
    refs = {r for _, a in page.elements for r in (a.get("aria-labelledby") or "").split()}
    assert refs <= set(idents)
    links = {a["href"] for t, a in page.elements if t == "a"}
    assert links <= {f"#{i}" for i in idents}


def test_the_page_asks_for_nothing_else(source: str):
    page = Page(source)
    style = re.search(r"<style>(.*?)</style>", source, re.S)
    script = re.search(r"<script>(.*?)</script>", source, re.S)
    assert style and script
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            target = attrs.get(name) or ""
            assert target == "" or target.startswith(("#", "data:")), (tag, name, target)
        assert "url(" not in (attrs.get("style") or "")
        assert not [name for name in attrs if name.startswith("on")]
    assert "@import" not in style[1] and "url(" not in style[1] and "http" not in style[1]
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|http|eval\(", script[1])
    assert "default-src 'none'" in source


def test_the_policy_lets_only_the_script_of_the_page_run(source: str):
    script = re.search(r"<script>(.*?)</script>", source, re.S)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in source


def test_the_page_is_small(source: str):
    assert len(source.encode("utf-8")) < 250_000


def test_writing_makes_the_folder_and_returns_the_path(tmp_path: Path, report: DemoReport, source: str):
    path = write_report(tmp_path / "new" / "report.html", report)
    assert path == tmp_path / "new" / "report.html"
    assert path.read_text(encoding="utf-8") == source


def test_every_number_appears(report: DemoReport, source: str):
    text = Page(source).text
    needle, learning = report.needle, report.learning
    assert needle and learning and needle.accuracy and learning.saved and learning.generated
    wanted = [m.name for m in report.header.models] + [f"{m.parameters:,}" for m in report.header.models]
    wanted += [report.header.date, report.header.hardware, *report.header.commands, *report.method]
    wanted += [*report.header.versions, *report.header.versions.values()]
    wanted += ["6 min 53 s", "31 min 33 s", "8.31 s"]
    wanted += [v for row in report.headline for v in (row.label, row.value, row.comparison, row.note)]
    wanted += [needle.needle, needle.key, needle.value, needle.answer, needle.twin_answer or ""]
    wanted += ["1,048,576", "6 min 47 s", "2,574", "612.4 MB", "73,204", "512 bytes", "✓ correct", "✗ wrong"]
    wanted += [needle.accuracy.command, "Shipped with the package, measured by", "0.001 %"]
    wanted += [f"{a.bits_per_byte:.4g}" for a in learning.averages] + ["1.87 to 1.91", learning.book]
    wanted += [a.note for a in learning.averages] + [a.condition for a in learning.averages]
    wanted += [*learning.fair_reading, "2,359,808 bytes", learning.saved.file, learning.saved.compared]
    wanted += [" ".join(learning.generated.continuation.split()), learning.generated.settings]
    assert [w for w in wanted if w not in text] == []


def test_hidden_tables_hold_the_data_of_the_charts(report: DemoReport, source: str):
    act = report.needle
    assert act and act.accuracy and report.learning
    tables = {table[0][0]: table for table in Page(source).tables if table[0]}
    rows = tables["context length (bytes, log scale)"][1:]
    for row, ours, twin in zip(rows, *(s.points for s in act.accuracy.series), strict=True):
        assert float(row[0]) == ours.context
        for cell, point in ((row[1], ours), (row[2], twin)):
            found = [float(x) for x in re.findall(r"[\d.]+", cell)]
            assert found == pytest.approx(
                [point.accuracy, point.low, point.high, point.n], rel=1e-3, abs=1e-3
            )
    rows = tables["position in the book (bytes)"][1:]
    for column, curve in enumerate(report.learning.held_out, start=1):
        assert [float(r[0]) for r in rows] == curve.x
        assert [float(r[column].split(" ")[0]) for r in rows] == pytest.approx(curve.y, rel=1e-4)


def test_thinning_keeps_true_points_and_the_extremes():
    ys = [math.sin(i / 50) for i in range(1000)]
    ys[333], ys[777] = 9.0, -9.0
    curve = Curve("c", [float(i) for i in range(1000)], ys, [y - 1 for y in ys], [y + 1 for y in ys])
    kept = thin(curve)
    assert MAX_POINTS <= len(kept.x) <= MAX_POINTS + 2
    assert all(ys[int(x)] == y for x, y in zip(kept.x, kept.y, strict=True))
    assert {0.0, 333.0, 777.0, 999.0} <= set(kept.x)
    assert kept.low == [y - 1 for y in kept.y]
    assert "of 1,000 points are drawn" in render_chart(LineChart("i", "t", "x", "y", [curve]))


@pytest.mark.parametrize(
    "curve",
    [
        Curve("one point", [5.0], [1.0]),
        Curve("flat", [1.0, 2.0], [3.0, 3.0]),
        Curve("zeros", [0.0, 1.0], [0.0, 0.0]),
        Curve("gap", [1.0, 2.0, 3.0], [1.0, math.nan, 2.0], [0.5, math.nan, 1.5], [1.5, math.nan, 2.5]),
        Curve(
            "long gap", [float(i) for i in range(1, 40)], [math.nan if i == 20 else i for i in range(1, 40)]
        ),
        Curve("tiny", [1.0, 10.0], [1e-9, 2e-9]),
    ],
    ids=lambda curve: curve.name,
)
@pytest.mark.parametrize("log_x", [False, True])
def test_awkward_curves_are_drawn_with_finite_numbers(curve: Curve, log_x: bool):
    drawn = render_chart(LineChart("i", "t", "x", "y", [curve], log_x=log_x))
    page = Page(drawn)
    assert page.count("title") == page.count("desc") == page.count("table") == 1
    for _, attrs in page.elements:
        for value in (attrs.get(k) or "" for k in ("d", "x", "y", "x1", "x2", "y1", "y2", "transform")):
            assert "nan" not in value and "inf" not in value


def test_a_curve_without_numbers_is_said_to_be_missing():
    drawn = render_chart(LineChart("i", "The title", "x", "y", [Curve("c", [1.0], [math.nan])]))
    assert "The title: not measured in this run." in drawn and "<svg" not in drawn


def test_memory_and_twin_keep_their_colours():
    curves = [
        Curve(name, [], [], role=role)
        for name, role in (("a", ""), ("t", "twin"), ("b", ""), ("m", "memory"))
    ]
    assert curve_slots(curves) == [2, 1, 3, 0]
    assert curve_slots(curves[:1]) == [0]
    assert len(set(curve_slots([Curve(str(i), [], [], role="memory") for i in range(5)]))) == 5


@pytest.mark.parametrize(("low", "high"), [(0.0, 100.0), (1.83, 2.41), (-3.0, 7.0), (5.0, 5.0), (1e-7, 9e-7)])
def test_ticks_are_round_and_enclose_the_range(low: float, high: float):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 8
    steps = [b - a for a, b in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_text_is_escaped_everywhere(report: DemoReport):
    assert report.needle and report.learning and report.surprise and report.needle.accuracy
    curve = Curve(NASTY, [1.0, 2.0], [1.0, 2.0])
    nasty = DemoReport(
        header=Header([ModelCard(NASTY, 1, "", NASTY)], NASTY, [NASTY], {NASTY: NASTY}, [], NASTY, NASTY),
        headline=[HeadlineRow(NASTY, NASTY, NASTY, NASTY)],
        needle=replace(
            report.needle,
            needle=NASTY,
            key="<script>",
            value='& "quoted"',
            answer=NASTY,
            twin_answer=NASTY,
            question=NASTY,
            notes=[NASTY],
            accuracy=replace(report.needle.accuracy, command=NASTY),
            process_memory=[curve],
        ),
        learning=LearningAct(
            loss=[curve, curve],
            loss_x=NASTY,
            averages=[ConditionAverage(NASTY, 1.0, NASTY)],
            fair_reading=[NASTY],
            book=NASTY,
            generated=GeneratedText(NASTY, NASTY, NASTY),
        ),
        surprise=SurprisePage(
            NASTY, [SurpriseLayer(NASTY, NASTY, [1.0] * len(NASTY), NASTY)], NASTY, [NASTY]
        ),
        method=[NASTY],
    )
    source = render_report(nasty)
    source.encode("utf-8")
    page = Page(source)
    assert page.count("script") == 1 and source.count("<script>") == 1 and source.count("</style>") == 1
    assert "alert(1)" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", source)
    assert not [
        name for _, attrs in page.elements for name in attrs if not re.fullmatch(r"[a-zA-Z-]+\d?", name)
    ]


def test_the_coloured_text_is_the_text(report: DemoReport, source: str):
    assert report.surprise
    ink = re.search(r'<div class="ink" id="ink">(.*?)</div>', source, re.S)
    assert ink
    assert html.unescape(re.sub(r"<[^>]+>", "", ink[1])) == report.surprise.text
    assert set(re.findall(r'class="?(\w)', ink[1])) <= set(LEVELS)


def test_levels_and_codes_rise_with_the_value():
    values = sorted([10 ** (k / 40 - 4) for k in range(300)] + [0.0, 0.0, 1e-30])
    scale, codes, levels = quantise(values)
    assert codes == sorted(codes) and levels == sorted(levels)
    assert levels[0] == 0 and levels[-1] == len(LEVELS) - 1 and max(codes) <= 254
    assert len(set(levels)) == len(LEVELS)
    inside = [(v, c) for v, c in zip(values, codes, strict=True) if c > 0]
    assert all(scale.decode(c) == pytest.approx(v, rel=0.05) for v, c in inside)


@pytest.mark.parametrize(
    "values", [[0.0] * 5, [3.0] * 5, [math.nan] * 5, [0.0, 2.0], [1.0], [-1.0, 5e-324, 1e300]]
)
def test_awkward_values_are_quantised(values: list[float]):
    _, codes, levels = quantise(values)
    assert [c == MISSING for c in codes] == [math.isnan(v) for v in values] == [k == -1 for k in levels]
    assert max(levels) < len(LEVELS)
    Page(render_surprise(with_text("x" * len(values), predictive=values)))


def test_the_script_gets_the_codes_of_every_kind(report: DemoReport, source: str):
    assert report.surprise
    packed = re.findall(r'data-codes="(.*?)"', source)
    assert len(packed) == len(report.surprise.layers)
    for text, layer in zip(packed, report.surprise.layers, strict=True):
        assert list(base64.b64decode(text)) == quantise(layer.values)[1]


def test_combining_marks_and_line_ends_are_one_sign():
    text = "e\u0301\r\nx\u200dy\r"
    signs, (joined,) = clusters(text, [[1.0, 5.0, 2.0, 3.0, 1.0, math.nan, 4.0, 0.5]])
    assert signs == ["e\u0301", "\n", "x\u200dy", "\n"]
    assert joined == [5.0, 3.0, 4.0, 0.5]


def test_text_reads_well_on_every_level_in_both_themes():
    for theme, dark in ((LIGHT, False), (DARK, True)):
        colours = ramp(dark)
        assert min(contrast(theme["read"], c) for c in colours) >= 4.5
        light = [luminance(c) for c in colours]
        assert light == sorted(light, reverse=not dark) and len(set(colours)) == len(LEVELS)
        for name in ("ink", "muted", "good", "bad", "c0", "c1", "c2", "c3", "c4", "c5"):
            assert min(contrast(theme[name], theme[b]) for b in ("paper", "card", "sunk")) >= 4.5, name
        assert contrast(theme["muted"], colours[-1]) > 1.5


def test_acts_that_were_not_run_say_so():
    text = Page(render_report(empty_report())).text
    assert text.count("This act was not run") == 3
    bare = replace(
        empty_report(),
        needle=NeedleAct("a needle", "k", "v", "", False, 0, 0.0, math.nan),
        learning=LearningAct(),
        surprise=SurprisePage("", []),
    )
    text = Page(render_report(bare)).text
    for part in ("Accuracy over context length", "Training", "Process memory", "Averages", "How strongly"):
        assert re.search(rf"{part}[^.]*: not measured in this run", text), part
    for part in (
        "No text was generated",
        "No memory was saved",
        "no text to colour",
        "not asked",
        "(nothing)",
    ):
        assert part in text


def test_what_is_not_known_is_not_claimed(report: DemoReport):
    assert report.needle
    unscored = replace(report.needle, correct=True, twin_correct=None)
    learning = LearningAct(averages=[ConditionAverage("one", 2.0), ConditionAverage("two", math.nan)])
    source = render_report(replace(empty_report(), needle=unscored, learning=learning))
    assert "not scored" in source and "✗ wrong" not in source
    assert ">not measured</td>" in source and "nan" not in source.partition("<body>")[2]


def test_json_round_trip(report: DemoReport):
    assert DemoReport.from_json(report.to_json()) == report
    assert DemoReport.from_json(empty_report().to_json(indent=1)) == empty_report()


def test_json_writes_what_is_not_finite_as_null():
    report = replace(empty_report(), surprise=with_text("ab", momentary=[1.0, math.nan]))
    assert "NaN" not in report.to_json()
    back = DemoReport.from_json(report.to_json()).surprise
    assert back and back.layers[0].values[0] == 1.0 and math.isnan(back.layers[0].values[1])


def test_json_names_what_it_does_not_know():
    data = json.loads(empty_report().to_json())
    data["header"]["models"][0]["colour"] = "red"
    with pytest.raises(ValueError, match=r"report\.header\.models\[0\]: unknown fields colour"):
        DemoReport.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Curve("c", [1.0], [1.0, 2.0]),
        lambda: Curve("c", [1.0], [1.0], low=[0.5]),
        lambda: Curve("c", [1.0], [1.0], counts=[1, 2]),
        lambda: with_text("abc", predictive=[1.0]),
        lambda: wilson_interval(3, 2),
    ],
)
def test_lengths_that_do_not_fit_are_refused(make: Callable[[], object]):
    with pytest.raises(ValueError, match=r"curve|layer|need"):
        make()


def test_wilson_interval():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 27.75), abs=0.01)
    assert wilson_interval(8, 10) == pytest.approx((49.02, 94.33), abs=0.01)


def test_numbers_are_written_plainly():
    assert [number(v) for v in (0, 1048576, 2.5, 1234.5678, 0.00123456, -3.0)] == [
        "0",
        "1,048,576",
        "2.5",
        "1,235",
        "0.001235",
        "-3",
    ]
    assert number(3.2e-7, 2) == "3.2 × 10⁻⁷" and number(math.nan) == "not measured"
    assert [duration(s) for s in (0.1234, 59.96, 125, 7321)] == [
        "0.123\u00a0s",
        "60\u00a0s",
        "2\u00a0min 5\u00a0s",
        "2\u00a0h 2\u00a0min",
    ]
    assert [short_count(v) for v in (0, 512, 4096, 1048576, 10000, 2.5e6)] == [
        "0",
        "512",
        "4K",
        "1M",
        "10k",
        "2.5M",
    ]


def test_the_report_needs_the_standard_library_only():
    allowed = sys.stdlib_module_names | {"miras"}
    code = "import sys; before = set(sys.modules); import miras.report; print(*set(sys.modules) - before)"
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert {name.partition(".")[0] for name in done.stdout.split()} <= allowed


def browse(folder: Path, page: Path, *options: str) -> str:
    """Open a page in headless Chromium and return what it prints."""
    assert CHROMIUM
    flags = [*FLAGS, "--virtual-time-budget=4000", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *flags, *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def measured(folder: Path, source: str, script: str, width: int) -> dict[str, object]:
    """Show the page in a frame `width` pixels wide and return what the script leaves in `out`."""
    unlocked = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    frame = folder / "frame.html"
    frame.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><pre id="out"></pre>'
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(unlocked)}"></iframe>'
        "<script>onload = () => { const page = frames[0], doc = page.document, out = {};"
        f"{script}; document.getElementById('out').textContent = JSON.stringify(out); }}</script>",
        encoding="utf-8",
    )
    found = re.search(r'<pre id="out">(.*?)</pre>', browse(folder, frame, "--dump-dom"), re.S)
    assert found and found[1], "the script in the frame did not finish"
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium executable")
class TestInChromium:
    """What only a browser can tell."""

    def test_a_screenshot_has_the_page_on_it(self, tmp_path: Path, report: DemoReport):
        path = write_report(tmp_path / "report.html", report)
        shot = tmp_path / "report.png"
        browse(tmp_path, path, f"--screenshot={shot}", "--window-size=1200,2400")
        assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 60_000

    @pytest.mark.parametrize("width", [320, 390, 1200])
    def test_the_text_reflows_without_sideways_scrolling(self, tmp_path: Path, source: str, width: int):
        script = (
            "out.width = page.innerWidth; out.scroll = doc.documentElement.scrollWidth;"
            "out.over = [...doc.querySelectorAll('body *')].filter((e) => !e.closest('.vh, pre, .skip') &&"
            " e.getBoundingClientRect().right > page.innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
        )
        out = measured(tmp_path, source, script, width)
        assert out["width"] == width and out["over"] == [] and out["scroll"] == width

    def test_the_reader_answers_to_keys_and_kinds(self, tmp_path: Path, source: str, report: DemoReport):
        assert report.surprise
        script = (
            "const ink = doc.getElementById('ink'), say = doc.getElementById('say');"
            "const press = (key) => {"
            " ink.dispatchEvent(new page.KeyboardEvent('keydown', { key })); return say.textContent; };"
            "out.signs = ink.children.length; out.text = ink.textContent;"
            "out.role = ink.getAttribute('role');"
            "out.first = press('ArrowRight'); out.second = press('ArrowRight');"
            "doc.querySelectorAll('.kinds input')[2].click();"
            "out.panels = [...doc.querySelectorAll('.panel')].map((p) => p.hidden);"
            "out.back = press('ArrowLeft');"
            "out.classes = [...ink.children].map((e) => e.className[0]).join('');"
            "press('Escape'); out.left = doc.querySelectorAll('.ink .C').length;"
        )
        out = measured(tmp_path, source, script, 900)
        page = report.surprise
        levels = quantise(page.layers[2].values)[2]
        assert out["signs"] == len(page.text) and out["text"] == page.text and out["role"] == "application"
        assert str(out["first"]).startswith(f"{page.text[0]}: momentary surprise")
        assert str(out["second"]).startswith(f"{page.text[1]}: momentary surprise")
        assert str(out["back"]).startswith(f"{page.text[0]}: predictive surprise")
        assert out["panels"] == [True, True, False] and out["left"] == 0
        assert out["classes"] == "".join(LEVELS[k] for k in levels)

    def test_charts_answer_to_keys(self, tmp_path: Path, source: str):
        script = (
            "const plot = doc.querySelector('#needle-accuracy .plot');"
            "plot.dispatchEvent(new page.KeyboardEvent('keydown', { key: 'ArrowRight' }));"
            "out.tip = plot.querySelector('.tip').textContent;"
        )
        tip = str(measured(tmp_path, source, script, 900)["tip"])
        assert "context length 4,096" in tip and "with memory: 100" in tip and "n = 200" in tip
