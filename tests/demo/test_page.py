"""The page of a demo: well formed, self-contained, safe, complete, readable, and true about what was measured."""

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from chromium import CHROMIUM, Tab, chromium
from miras.demo.page import (
    ConditionAverage,
    DemoReport,
    GeneratedText,
    Haystack,
    HeadlineRow,
    ModelCard,
    SavedMemory,
    SurpriseAct,
    charts,
    render_report,
    write_report,
)
from miras.report.chart import Curve
from miras.report.explorer import Watched

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


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("no chromium executable")
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, report: DemoReport) -> Path:
    """The page as a file."""
    return write_report(tmp_path_factory.mktemp("page") / "report.html", report)


def test_the_page_is_well_formed_and_has_one_of_each_landmark(source: str):
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    for tag in ("h1", "main", "header", "footer", "style"):
        assert page.count(tag) == 1, tag
    idents = [a["id"] for _, a in page.elements if "id" in a]
    assert len(idents) == len(set(idents))
    refs = {r for _, a in page.elements for r in (a.get("aria-labelledby") or "").split()}
    assert refs <= set(idents)
    links = {a["href"] for t, a in page.elements if t == "a"}
    assert links <= {f"#{i}" for i in idents}


def test_the_page_asks_for_nothing_else(source: str):
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", source, re.S) for tag in ("style", "script"))
    assert style and script
    for tag, attrs in Page(source).elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            target = attrs.get(name) or ""
            assert target == "" or target.startswith(("#", "data:")), (tag, name, target)
        assert "url(" not in (attrs.get("style") or "")
        assert not [name for name in attrs if name.startswith("on")]
    assert "@import" not in style[1] and "url(" not in style[1] and "http" not in style[1]
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|eval\(", script[1])
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in source


def test_the_page_is_small(source: str):
    assert len(source.encode("utf-8")) < 270_000


def test_every_number_appears(report: DemoReport, source: str):
    text = Page(source).text
    needle, learning = report.needle, report.learning
    wanted = [m.name for m in report.models] + [f"{m.parameters:,}" for m in report.models]
    wanted += [report.date, report.hardware, *report.commands, *report.versions, *report.versions.values()]
    wanted += ["6 min 53 s", "31 min 33 s", "8.31 s"]
    wanted += [v for row in report.headline for v in (row.label, row.value, row.comparison, row.note)]
    wanted += [needle.needle, needle.key, needle.value, needle.answer, needle.twin_answer, needle.haystack]
    wanted += ["1,048,576", "6 min 47 s", "2,574", "610.3 MB", "73,204", "512 bytes", "✓ correct", "✗ wrong"]
    wanted += [needle.command, "Shipped with the package, measured by"]
    wanted += [f"{a.bits_per_byte:.4g}" for a in learning.averages]
    wanted += [a.note for a in learning.averages] + [a.condition for a in learning.averages]
    wanted += [*learning.fair_reading, learning.book, "2,359,808 bytes", learning.saved.file]
    wanted += [" ".join(learning.generated.continuation.split()), learning.generated.settings]
    wanted += [
        learning.saved.compared,
        report.surprise.source,
        " ".join("".join(report.surprise.watched.pieces).split()),
    ]
    assert [w for w in wanted if w not in text] == []
    others = next(t for t in Page(source).tables if t and t[0] and t[0][0] == "Text around the needle")
    assert others[1:] == [
        ["a novel", "16,384", "71.5 %", "0 %", "200"],
        ["lorem ipsum", "16,384", "93 %", "0.5 %", "200"],
    ]


def test_the_tables_hold_the_data_of_the_charts(report: DemoReport, source: str):
    tables = {table[0][0]: table for table in Page(source).tables if table and table[0]}
    rows = tables["context length (bytes, log scale)"][1:]
    ours, twin = report.needle.accuracy
    for index, row in enumerate(rows):
        assert float(row[0]) == ours.x[index]
        for cell, curve in ((row[1], ours), (row[2], twin)):
            found = [float(x) for x in re.findall(r"[\d.]+", cell)]
            values = (curve.y, curve.low, curve.high, curve.counts)
            assert found == pytest.approx([each[index] for each in values], rel=1e-3, abs=1e-3)
    rows = tables["position in the book (bytes)"][1:]
    for column, curve in enumerate(report.learning.held_out, start=1):
        assert [float(r[0]) for r in rows] == curve.x
        assert [float(r[column].split(" ")[0]) for r in rows] == pytest.approx(curve.y, rel=1e-4)


def test_what_a_stranger_s_text_says_is_only_text(report: DemoReport):
    curve = Curve(NASTY, [1.0, 2.0], [1.0, 2.0])
    count = len(NASTY)
    nasty = DemoReport(
        title=NASTY,
        models=[ModelCard(NASTY, 1, "memory", NASTY)],
        date=NASTY,
        hardware=NASTY,
        commands=[NASTY],
        versions={NASTY: NASTY},
        timings=[(NASTY, 1.0)],
        headline=[HeadlineRow(NASTY, NASTY, NASTY, NASTY)],
        needle=replace(
            report.needle,
            needle=NASTY,
            key="<script>",
            value='& "quoted"',
            answer=NASTY,
            twin_answer=NASTY,
            question=NASTY,
            haystack=NASTY,
            command=NASTY,
            notes=[NASTY],
            others=[Haystack(NASTY, 1, 0.0, 0.0, 1)],
            process_memory=curve,
        ),
        learning=replace(
            report.learning,
            loss=[curve, curve],
            held_out=[curve],
            loss_x=NASTY,
            averages=[ConditionAverage(NASTY, 1.0, NASTY)],
            fair_reading=[NASTY],
            book=NASTY,
            generated=GeneratedText(NASTY, NASTY, NASTY),
            saved=SavedMemory(NASTY, 1, 0.0, NASTY),
        ),
        surprise=SurpriseAct(Watched(list(NASTY), np.ones(count, np.float32), {}), NASTY),
    )
    source = render_report(nasty)
    source.encode("utf-8")
    page = Page(source)
    assert page.count("script") == 2 and source.count("<script") == 2 and source.count("</style>") == 1
    assert "alert(1)" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", source)
    names = {name for _, attrs in page.elements for name in attrs}
    assert not [name for name in names if not re.fullmatch(r"[a-zA-Z-]+\d?", name)]


def test_the_page_says_whose_weights_these_are(report: DemoReport, source: str):
    assert "were not trained in this run" in source and "Both models were trained in this run" not in source
    again = render_report(replace(report, needle=replace(report.needle, retrained=True)))
    assert "were not trained in this run" not in again and "Both models were trained in this run" in again
    assert "measured on other weights" in again and "measured on other weights" not in source


def test_a_wrong_answer_is_called_wrong(report: DemoReport):
    silent = replace(report.needle, answer="", twin_answer=report.needle.value)
    text = Page(render_report(replace(report, needle=silent))).text
    assert re.search(r"Model with memory \(nothing\) ✗ wrong Attention-only twin 58213 ✓ correct", text)


def test_charts_of_a_run_have_names_of_their_own(report: DemoReport):
    found = charts(report)
    assert len(found) == 6 and all(chart.ident == name for name, chart in found.items())


# In a browser


@pytest.mark.parametrize(("width", "dark"), [(320, True), (400, False), (1280, False), (1280, True)])
def test_it_opens_without_a_complaint_and_reflows(tab: Tab, path: Path, width: int, dark: bool):
    tab.open(path, width=width, dark=dark)
    assert tab.complaints == []
    over = tab.run(
        "[...document.querySelectorAll('body *')].filter((e) => !e.closest('.vh, pre, .skip, .wide') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert over == [] and tab.run("document.documentElement.scrollWidth") == width
    assert tab.run("document.querySelectorAll('.chart svg[role=img]').length") == 6
    assert tab.faint() == []


def test_charts_draw_what_their_tables_say(tab: Tab, path: Path, report: DemoReport):
    tab.open(path)
    places = tab.run(
        "[...document.querySelectorAll('#needle-accuracy .s0 > svg .mk')].map((m) => +m.getAttribute('transform')"
        ".match(/ ([-.\\d]+)/)[1])"
    )
    ours = report.needle.accuracy[0]
    assert places == pytest.approx([300 * (1 - y / 100) for y in ours.y], abs=0.1)
    said = tab.run("document.querySelector('#loss svg[role=img]').getAttribute('aria-label')")
    assert said.startswith("Training. with memory: from ") and "attention-only twin: from " in said
    assert "1K = 1,024" in tab.run("document.querySelector('#needle-accuracy .xlabel').textContent")


def test_charts_answer_to_keys(tab: Tab, path: Path):
    tab.open(path)
    tab.run("document.querySelector('#needle-accuracy .plot').focus()")
    tab.press("ArrowRight")
    tip = tab.run("document.querySelector('#needle-accuracy .tip').textContent")
    assert "context length 4,096" in tip and "with memory: 100" in tip and "n = 200" in tip
    tab.press("ArrowRight")
    assert "8,192" in tab.run("document.querySelector('#needle-accuracy .tip').textContent")


def test_act_three_is_the_page_of_miras_report(tab: Tab, path: Path, report: DemoReport):
    tab.open(path)
    pieces = report.surprise.watched.pieces
    assert tab.run("document.querySelector('#kinds :checked').value") == "predictive"
    assert tab.run("ink.textContent") == "".join(pieces)
    tab.run("ink.focus()")
    tab.press("ArrowRight")
    said = tab.run("document.getElementById('say').textContent")
    assert said.startswith(f"{pieces[1]}, token 2 of {len(pieces):,}: Predictive surprise")


def test_without_a_script_the_numbers_are_there(tab: Tab, path: Path, report: DemoReport):
    for domain in ("DOM", "CSS"):
        tab.tell(f"{domain}.enable")
    tab.tell("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.tell("Page.navigate", url=path.as_uri())
        shown = ""
        while "a made-up" not in shown or "Versions" not in shown:
            nodes = tab.tell("Accessibility.getFullAXTree")["nodes"]
            shown = " ".join(str(n["name"]["value"]) for n in nodes if n.get("name", {}).get("value"))
        assert "100 (98.115 to 100, n = 200)" in shown and "scripts are switched off" in shown
        assert "".join(report.surprise.watched.pieces)[:60] in shown
        root = tab.tell("DOM.getDocument")["root"]["nodeId"]
        found = {
            name: tab.tell("DOM.querySelector", nodeId=root, selector=f"#needle-accuracy .{name}")["nodeId"]
            for name in ("data", "plot")
        }
        assert tab.tell("DOM.getBoxModel", nodeId=found["data"])["model"]["height"] > 200
        style = tab.tell("CSS.getComputedStyleForNode", nodeId=found["plot"])["computedStyle"]
        assert {"name": "display", "value": "none"} in style
    finally:
        tab.tell("Emulation.setScriptExecutionDisabled", value=False)
