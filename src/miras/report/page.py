"""The report page: one self-contained HTML file written from a DemoReport."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from .chart import LineChart, curve_slots, render_chart
from .model import (
    MEMORY,
    TWIN,
    ConditionAverage,
    Curve,
    DemoReport,
    GeneratedText,
    Haystack,
    Header,
    HeadlineRow,
    LearningAct,
    NeedleAccuracy,
    NeedleAct,
    SavedMemory,
    SurprisePage,
)
from .shell import render_shell
from .surprise import render_surprise, stripes
from .text import duration, esc, number

_NOT_RUN = '<p class="absent">This act was not run, so there is nothing to show here.</p>'
_READ_AXIS = "tokens read (one byte each)"


def write_report(path: str | Path, report: DemoReport) -> Path:
    """Write the report to `path` as one HTML file, making its folder, and return the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render_report(report), encoding="utf-8")
    return target


def render_report(report: DemoReport) -> str:
    """Return the report as HTML text that needs no other file and makes no request."""
    main = "\n".join(
        (
            _headline(report.headline),
            _act("one", "One", "A needle in a haystack", _needle(report.needle)),
            _act("two", "Two", "It learns to read", _learning(report.learning)),
            _act("three", "Three", "A page in surprise", _surprise(report.surprise)),
        )
    )
    return render_shell(
        title=report.header.title,
        kind="demo",
        header=_header(report),
        main=main,
        footer=_footer(report),
        styles=["style.css"],
        scripts=["theme.js", "script.js"],
    )


def _act(ident: str, numeral: str, title: str, body: str) -> str:
    """Return one act as a section under its heading."""
    return (
        f'<section class="act" id="act-{ident}" aria-labelledby="act-{ident}-h">'
        f'<h2 id="act-{ident}-h"><span>Act {numeral}</span> {title}</h2>{body}</section>'
    )


def _header(report: DemoReport) -> str:
    """Return the opening: what the page is, the stripes of the page read, the models and the contents."""
    header = report.header
    bars, step = stripes(report.surprise) if report.surprise else ("", 0)
    strip = (
        f'<figure class="stripes"><div aria-hidden="true">{bars}</div><figcaption>The page of Act Three at a '
        f"glance: each stripe is {step:,} characters, deeper where {esc(report.surprise.layers[0].kind)} surprise "
        "was higher."
        "</figcaption></figure>"
        if bars and report.surprise
        else ""
    )
    models = "".join(
        f"<div{_role(m.role)}><dt>{esc(m.name)}</dt><dd><b>{m.parameters:,}</b> parameters"
        f"{f'<br><span>{esc(m.note)}</span>' if m.note else ''}</dd></div>"
        for m in header.models
    )
    when = f"<div><dt>Run</dt><dd><b>{esc(header.date)}</b>{_hardware(header)}</dd></div>"
    return (
        '<p class="lede">Most of a language model is fixed once it is trained. Here one part, a small '
        "memory, keeps training itself on the text as it goes by. This page shows what that memory did in "
        "one run, beside a twin of the same model that has attention only.</p>"
        f'{strip}<dl class="facts">{models}{when}</dl>'
        '<nav aria-label="Acts"><ol><li><a href="#act-one">A needle in a haystack</a></li>'
        '<li><a href="#act-two">Learning to read</a></li><li><a href="#act-three">A page in surprise</a></li>'
        '<li><a href="#method">How it was measured</a></li></ol></nav>'
    )


def _hardware(header: Header) -> str:
    """Return what the run was made on."""
    return f"<br><span>{esc(header.hardware)}</span>" if header.hardware else ""


def _role(role: str) -> str:
    """Return the class attribute that gives a model's colour."""
    return {MEMORY: ' class="s0"', TWIN: ' class="s1"'}.get(role, "")


def _headline(rows: list[HeadlineRow]) -> str:
    """Return the headline table."""
    if not rows:
        return ""
    body = "".join(
        f'<tr role="row"><th role="rowheader" scope="row">{esc(r.label)}</th>'
        f'<td role="cell" class="value">{esc(r.value)}</td>'
        f'<td role="cell">{esc(r.comparison)}</td><td role="cell" class="aside">{esc(r.note)}</td></tr>'
        for r in rows
    )
    heads = "".join(
        f'<th role="columnheader" scope="col">{name}</th>'
        for name in ("Measure", "Value", "Compared with", "Note")
    )
    return (
        '<section aria-labelledby="headline-h"><h2 class="vh" id="headline-h">In short</h2>'
        f'<table class="headline" role="table"><thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table></section>'
    )


def _needle(act: NeedleAct | None) -> str:
    """Return act one: the needle, both answers, what reading cost, and the charts."""
    if act is None:
        return _NOT_RUN
    sentence = _marked(act.needle, act.key, act.value)
    question = f'<p class="question">Asked at the end: <q>{esc(act.question)}</q></p>' if act.question else ""
    answers = _answer("Model with memory", MEMORY, act.answer, act.correct)
    if act.twin_answer is not None:
        answers += _answer("Attention-only twin", TWIN, act.twin_answer, act.twin_correct)
    else:
        answers += '<div class="answer s1"><h4>Attention-only twin</h4><p class="absent">not asked</p></div>'
    unit = " MB" if math.isfinite(act.peak_memory_mb) else ""
    stats = _stats(
        (
            (f"{act.bytes_read:,}", "bytes read"),
            (duration(act.seconds), "to read them"),
            (number(act.bytes_per_second, 3), "bytes per second"),
            (f"{number(act.peak_memory_mb)}{unit}", "peak process memory"),
        )
    )
    charts = _accuracy(act.accuracy) + _others(act.others)
    charts += _optional_chart(
        "memory-use",
        "Process memory while reading",
        "process memory (MB)",
        act.process_memory,
        floor=0,
    )
    pair = _optional_chart("write-rate", "How strongly it writes", "mean write rate", act.write_rate, 170, 0)
    pair += _optional_chart("memory-norm", "How large the memory is", "memory norm |W|", act.memory_norm, 170)
    made = f" The text is made of <q>{esc(act.haystack.strip())}</q>, over and over." if act.haystack else ""
    weights = f'<p class="note">{esc(act.weights)}</p>' if act.weights else ""
    return (
        '<p class="intro">One sentence is hidden early in a long stream of text. Much later, past everything '
        "attention can still see, the model is asked for it. Only a memory that was written while reading "
        f"can hold the answer.{made}</p>{weights}"
        f'<div class="card"><p class="label">The needle</p><blockquote>{sentence}</blockquote>'
        f'<dl class="pair"><div><dt>key</dt><dd>{esc(act.key)}</dd></div>'
        f"<div><dt>true value</dt><dd>{esc(act.value)}</dd></div></dl>{_map(act)}{question}"
        f'<div class="answers">{answers}</div></div>{stats}{charts}<div class="small">{pair}</div>'
        f"{_notes(act.notes)}"
    )


def _marked(sentence: str, key: str, value: str) -> str:
    """Escape the needle sentence with its key and its value marked, where they occur."""
    words = ((key, "key"), (value, "val"))
    starts = sorted((sentence.find(word), word, kind) for word, kind in words if word)
    parts, end = [], 0
    for start, word, kind in starts:
        if start >= end:
            parts.append(f'{esc(sentence[end:start])}<mark class="{kind}">{esc(word)}</mark>')
            end = start + len(word)
    return "".join(parts) + esc(sentence[end:])


def _answer(name: str, role: str, answer: str, correct: bool | None) -> str:
    """Return one model's answer with whether it is right, if that is known, in words and a sign."""
    verdict = {
        True: '<b class="good">✓ correct</b>',
        False: '<b class="bad">✗ wrong</b>',
        None: "not scored",
    }[correct]
    shown = esc(answer) if answer.strip() else '<span class="absent">(nothing)</span>'
    slot = {MEMORY: 0, TWIN: 1}[role]
    return f'<div class="answer s{slot}"><h4>{name}</h4><p class="said">{shown}</p><p>{verdict}</p></div>'


def _map(act: NeedleAct) -> str:
    """Return a bar of the whole text with the needle's place and the stretch the twin can see."""
    if act.needle_position is None or act.bytes_read <= 0:
        return ""
    place = 100 * act.needle_position / act.bytes_read
    words = f"The needle stands at byte {act.needle_position:,} of {act.bytes_read:,}"
    window = ""
    if act.twin_window is not None:
        width = 100 * min(1.0, act.twin_window / act.bytes_read)
        window = (
            f'<rect class="window" x="{100 - width:.3f}%" width="{width:.3f}%" y="8" height="14"/>'
            f'<rect class="window" x="100%" width="2" transform="translate(-2 0)" y="8" height="14"/>'
        )
        words += f"; the question is at the end, where the twin sees the last {act.twin_window:,} bytes"
    return (
        '<figure class="map"><svg width="100%" height="30" aria-hidden="true">'
        '<rect class="all" x="0" y="8" width="100%" height="14" rx="2"/>'
        f'{window}<rect class="pin" x="{place:.3f}%" width="3" y="2" height="26" rx="1.5"/></svg>'
        f"<figcaption>{words}.</figcaption></figure>"
    )


def _stats(items: Iterable[tuple[str, str]]) -> str:
    """Return a row of large numbers with what they count."""
    cells = "".join(f"<div><dt>{esc(label)}</dt><dd>{esc(value)}</dd></div>" for value, label in items)
    return f'<dl class="stats">{cells}</dl>'


def _accuracy(accuracy: NeedleAccuracy | None) -> str:
    """Return the chart of needle accuracy over context length with where the numbers come from."""
    if accuracy is None or not any(s.points for s in accuracy.series):
        return '<p class="absent">Accuracy over context length: not measured in this run.</p>'
    curves = [
        Curve(
            name=s.name,
            x=[p.context for p in s.points],
            y=[p.accuracy for p in s.points],
            low=[p.low for p in s.points],
            high=[p.high for p in s.points],
            counts=[p.n for p in s.points],
            role=s.role,
        )
        for s in accuracy.series
    ]
    chance = accuracy.chance
    origin = "Shipped with the package, measured by" if accuracy.precomputed else "Measured in this run by"
    chart = LineChart(
        ident="needle-accuracy",
        title="Needles found at each text length",
        x_label="context length (bytes, log scale)",
        y_label="needles found (%), with 95 % Wilson intervals",
        curves=curves,
        log_x=True,
        y_range=(0, 100),
        reference=None if chance is None else (chance, f"guessing, {number(chance)} %"),
    )
    return (
        f'{render_chart(chart)}<p class="origin{" shipped" if accuracy.precomputed else ""}">{origin} '
        f"<code>{esc(accuracy.command)}</code></p>"
    )


def _others(rows: list[Haystack]) -> str:
    """Return the table of needles found in other texts than that of this act."""
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{esc(r.name)}</th><td class="num">{r.context:,}</td>'
        f'<td class="num s0">{number(r.memory, 3)} %</td><td class="num s1">{number(r.twin, 3)} %</td>'
        f'<td class="num">{r.n:,}</td></tr>'
        for r in rows
    )
    heads = ("Text around the needle", "Bytes", "With memory", "Attention only", "Samples")
    return (
        '<h3>In other texts</h3><p class="note">What the memory keeps depends on the text that it was trained to '
        "ignore: the share of needles found, measured as the chart above.</p>"
        f'<table class="averages others"><thead><tr>{"".join(f"<th scope=col>{h}</th>" for h in heads)}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _optional_chart(
    ident: str,
    title: str,
    y_label: str,
    curves: list[Curve],
    height: int = 240,
    floor: float | None = None,
    x_label: str = _READ_AXIS,
) -> str:
    """Return a line chart, or a line that says it was not measured; `floor` makes the y axis start there."""
    if not any(curve.x for curve in curves):
        return f'<p class="absent">{esc(title)}: not measured in this run.</p>'
    top = max((v for c in curves for v in (*c.y, *c.high) if math.isfinite(v)), default=1.0)
    y_range = None if floor is None else (floor, max(top, floor + 1e-9))
    return render_chart(LineChart(ident, title, x_label, y_label, curves, y_range=y_range, height=height))


def _learning(act: LearningAct | None) -> str:
    """Return act two: training, reading a held-out book, the generated text and the saved memory."""
    if act is None:
        return _NOT_RUN
    book = f" ({esc(act.book)})" if act.book else ""
    return (
        '<p class="intro">First both models are trained on text in the ordinary way. Then they read a book '
        "neither has seen, with all ordinary weights fixed. If the memory learns while it reads, the bits "
        "it needs for each byte should fall below those of the same model with its memory held still.</p>"
        + _optional_chart("loss", "Training", "bits per byte", act.loss, 280, x_label=act.loss_x)
        + _optional_chart(
            "held-out",
            "Reading a held-out book",
            "bits per byte, lower is better",
            act.held_out,
            340,
            x_label="position in the book (bytes)",
        )
        + _averages(act, book)
        + _generated(act.generated)
        + _saved(act.saved)
    )


def _averages(act: LearningAct, book: str) -> str:
    """Return the table of averages over the held-out book and the notes on reading it fairly."""
    fair = ""
    if act.fair_reading:
        items = "".join(f"<li>{esc(s)}</li>" for s in act.fair_reading)
        fair = (
            '<aside class="fair" aria-labelledby="fair-h"><h3 id="fair-h">A fair reading</h3>'
            f"<ul>{items}</ul></aside>"
        )
    if not act.averages:
        return f'<p class="absent">Averages over the held-out book: not measured in this run.</p>{fair}'
    columns = [v for r in act.averages for v in (r.bits_per_byte, r.low, r.high)]
    ends = [v for v in columns if v is not None and math.isfinite(v)] or [math.nan]
    least, most = min(ends), max(ends)
    slots = dict(zip((c.name for c in act.held_out), curve_slots(act.held_out), strict=True))
    rows = []
    for row in act.averages:
        slot = slots.get(row.condition, {MEMORY: 0, TWIN: 1}.get(row.role, 4))
        interval = (
            f"<br><span>{number(row.low)} to {number(row.high)}</span>"
            if row.low is not None and row.high is not None
            else ""
        )
        rows.append(
            f'<tr><th scope="row" class="s{slot}">{esc(row.condition)}</th>'
            f'<td class="num">{number(row.bits_per_byte)}{interval}</td>'
            f'<td class="gauge s{slot}" aria-hidden="true">{_dot(row, least, most)}</td>'
            f'<td class="aside">{esc(row.note)}</td></tr>'
        )
    return (
        f'<h3>Average over the held-out book{book}</h3><table class="averages"><thead><tr>'
        '<th scope="col">Condition</th><th scope="col">Bits per byte</th>'
        '<td class="gauge" aria-hidden="true"></td>'
        f'<th scope="col">Note</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'<p class="note gauged">Each dot lies between {number(least)} (left) and {number(most)} (right).</p>'
        f"{fair}"
    )


def _dot(row: ConditionAverage, least: float, most: float) -> str:
    """Return one average as a dot, with its interval, on a line from the least to the most of all rows."""

    if not math.isfinite(row.bits_per_byte):
        return ""

    def place(value: float) -> str:
        return f"{50 if most == least else 100 * (value - least) / (most - least):.1f}%"

    span = (
        f'<line class="span" x1="{place(row.low)}" x2="{place(row.high)}" y1="7" y2="7"/>'
        if row.low is not None and row.high is not None
        else ""
    )
    dot = f'<circle cx="{place(row.bits_per_byte)}" cy="7" r="5"/>'
    return (
        f'<svg width="100%" height="14"><line class="base" x1="0" x2="100%" y1="7" y2="7"/>{span}{dot}</svg>'
    )


def _generated(text: GeneratedText | None) -> str:
    """Return the generated paragraph with the prompt set apart from the continuation."""
    if text is None:
        return '<h3>It writes</h3><p class="absent">No text was generated in this run.</p>'
    settings = f'<p class="note">{esc(text.settings)}</p>' if text.settings else ""
    return (
        '<h3>It writes</h3><div class="card writing"><p class="label"><span class="p">given prompt</span> '
        '<span class="c">what the model wrote</span></p><div class="prose"><span class="vh">Prompt: </span>'
        f'<span class="p">{esc(text.prompt)}</span><span class="vh"> Continuation: </span>'
        f'<span class="c">{esc(text.continuation)}</span></div>{settings}</div>'
    )


def _saved(saved: SavedMemory | None) -> str:
    """Return the proof that a saved memory comes back the same."""
    if saved is None:
        return '<h3>It keeps what it learned</h3><p class="absent">No memory was saved in this run.</p>'
    where = "a fresh process" if saved.fresh_process else "the same process"
    same = "largest difference: none" if saved.max_difference == 0 else "largest difference"
    compared = f'<p class="note">{esc(saved.compared)}</p>' if saved.compared else ""
    return (
        '<h3>It keeps what it learned</h3><ol class="steps">'
        f"<li><span>saved to</span><b><code>{esc(saved.file)}</code></b>"
        f"<span>{saved.bytes:,} bytes</span></li>"
        f"<li><span>loaded in</span><b>{where}</b><span>and read on from there</span></li>"
        f"<li><span>compared</span><b>{number(saved.max_difference)}</b><span>{same}</span></li>"
        f"</ol>{compared}"
    )


def _surprise(page: SurprisePage | None) -> str:
    """Return act three: the page coloured by surprise."""
    if page is None:
        return _NOT_RUN
    return (
        '<p class="intro">Below is a page as it was read, each character coloured by its surprise. There are three '
        "kinds, and they are not one thing. <em>Predictive</em> surprise is what a reader would call so: how "
        "unexpected the character was to the whole model. <em>Momentary</em> surprise is the papers’ word for what "
        "the memory learns from: how far what it recalls for the character is from what it is to recall. It "
        "says how hard the memory is pushed, not how rare the text is, and the two need not go together. "
        "<em>Accumulated</em> surprise is that push with what is left of earlier ones.</p>"
        + render_surprise(page)
    )


def _footer(report: DemoReport) -> str:
    """Return how it was measured: method, commands, times and versions."""
    header = report.header
    method = "".join(f"<p>{esc(s)}</p>" for s in report.method)
    absent = '<p class="absent">No notes were given.</p>'
    commands = "\n".join(esc(c) for c in header.commands)
    again = f'<h3>Run it again</h3><pre tabindex="0"><code>{commands}</code></pre>' if commands else ""
    times = "".join(
        f"<div><dt>{esc(t.label)}</dt><dd>{duration(t.seconds)}</dd></div>" for t in header.timings
    )
    took = f'<div><h3>Wall-clock time</h3><dl class="list">{times}</dl></div>' if times else ""
    parts = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in header.versions.items())
    versions = f'<div><h3>Versions</h3><dl class="list">{parts}</dl></div>' if parts else ""
    return (
        '<section id="method" aria-labelledby="method-h"><h2 id="method-h">How it was measured</h2>'
        f"{method or absent}</section>"
        f'{again}<div class="small">{took}{versions}</div>'
    )


def _notes(notes: list[str]) -> str:
    """Return notes as small paragraphs."""
    return "".join(f'<p class="note">{esc(note)}</p>' for note in notes)
