"""`miras demo`: three acts, a table and a page."""

import importlib.metadata
import platform
from datetime import UTC, datetime

import torch
from rich.console import Console
from rich.table import Table

from miras.data.fillers import read_books
from miras.data.novel import load_novel
from miras.demo.meter import Clock, bar
from miras.demo.needle import STAGES, STEPS, load, retrain
from miras.demo.needle_act import needle_act
from miras.demo.options import DemoOptions
from miras.demo.page import DemoReport, HeadlineRow, LearningAct, ModelCard, NeedleAct, write_report
from miras.demo.reading_act import reading_act, surprise_act
from miras.nn.lm import LM
from miras.nn.threads import check_seed, set_threads
from miras.report.explorer import agreement


def demo(options: DemoOptions) -> int:
    """Run the three acts and write OUT/report.html; returns the exit status."""
    set_threads(options.threads)
    if options.needle_bytes < 4096:
        raise ValueError(f"--needle-bytes must be at least 4096, got {options.needle_bytes}")
    if not options.reading_seconds > 0:
        raise ValueError(f"--reading-seconds must be positive, got {options.reading_seconds}")
    check_seed(options.seed)
    console = Console()
    whole = Clock()
    options.out.mkdir(parents=True, exist_ok=True)
    models = _retrained(options, console) if options.retrain_needle else load()

    clock = Clock()
    first = needle_act(models, options.needle_bytes, options.seed, console, retrained=options.retrain_needle)
    timings = [("a needle in a haystack", clock())]

    clock = Clock()
    novel = load_novel()
    second, reader, steps = reading_act(novel, options.out, options.reading_seconds, options.seed, console)
    timings.append(("learning to read", clock()))

    clock = Clock()
    console.print("\n[bold]Look.[/]")
    third = surprise_act(reader, novel)
    console.print(agreement(third.watched), highlight=False)
    rows = headline(first, second)
    threads = torch.get_num_threads()
    weights = "trained in this run" if options.retrain_needle else "weights shipped"
    report = DemoReport(
        title="A memory that learns while it reads",
        models=[
            ModelCard(
                "needle model",
                models["memory"].num_parameters(),
                "memory",
                f"attention, then memory; {weights}",
            ),
            ModelCard("its twin", models["twin"].num_parameters(), "twin", f"attention only; {weights}"),
            ModelCard(
                "reader", reader.num_parameters(), "memory", f"titans-mag, {steps:,} steps in this run"
            ),
        ],
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commands=["make demo", f"miras demo --seed {options.seed}", "miras demo --retrain-needle"],
        versions={
            "miras": importlib.metadata.version("miras-torch"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        timings=timings,
        hardware=f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}",
        headline=rows,
        needle=first,
        learning=second,
        surprise=third,
    )
    path = write_report(options.out / "report.html", report)
    table = Table("", "with memory", "compared with", title="What happened", title_justify="left")
    for row in rows:
        table.add_row(row.label, row.value, row.comparison)
    for label, seconds in (*timings, ("look", clock())):
        table.add_row(label, f"{seconds:.0f} s", "")
    console.print(table)
    console.print(f"{whole():.0f} s in all. Look at [bold]{path}[/]", highlight=False, soft_wrap=True)
    return 0


def headline(first: NeedleAct, second: LearningAct) -> list[HeadlineRow]:
    """The rows of the closing table."""
    low, high = min(first.process_memory.y), max(first.process_memory.y)
    by_name = {a.condition: a.bits_per_byte for a in second.averages}
    saved = second.saved
    weights = "weights trained in this run" if first.retrained else "weights shipped"
    return [
        HeadlineRow(
            f"needle, after {first.bytes_read:,} bytes",
            f"{first.answer} {'(right)' if first.correct else '(wrong)'}",
            f"attention only: {first.twin_answer} {'(right)' if first.twin_correct else '(wrong)'}, "
            f"the number was {first.value}",
            f"{weights}; an easy haystack",
        ),
        HeadlineRow(
            "reading speed, process memory",
            f"{first.bytes_per_second:,.0f} bytes/s, {low:,.0f} to {high:,.0f} MB",
            "",
            "one stream, batch 1",
        ),
        HeadlineRow(
            "held-out bits per byte",
            f"{by_name['memory learning']:.3f}",
            ", ".join(f"{name} {bits:.3f}" for name, bits in by_name.items() if name != "memory learning"),
            "one short training; see the fair reading",
        ),
        HeadlineRow(
            "memory saved and loaded in a fresh process",
            f"{saved.bytes:,} bytes",
            f"largest difference {saved.max_difference:g}",
            saved.compared,
        ),
    ]


def _retrained(options: DemoOptions, console: Console) -> dict[str, LM]:
    """Both needle models, retrained."""
    with bar(console, "training needle models", STEPS + STAGES[0].steps) as show:

        def tell(name: str, row: dict[str, float]) -> None:
            done = row["step"] + 1 + (STEPS if name == "twin" else 0)
            show(done, f"{name}: accuracy {row['accuracy']:.2f} at {row['length']:,.0f} bytes")

        books = read_books(options.books) if options.books is not None else ()
        made = retrain(options.out / "needle", options.seed, tell, books=books)
        return {n: m.eval() for n, m in made.items()}
