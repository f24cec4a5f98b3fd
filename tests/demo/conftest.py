"""A made-up report for the page tests: test data, no number in it was ever measured."""

import math
import random

import numpy as np
import pytest

from miras.demo.page import (
    ConditionAverage,
    DemoReport,
    GeneratedText,
    Haystack,
    HeadlineRow,
    LearningAct,
    ModelCard,
    NeedleAct,
    SavedMemory,
    SurpriseAct,
)
from miras.evaluate.needle import wilson
from miras.report.chart import Curve
from miras.report.explorer import Watched

SENTENCES = (
    "The keeper of the lighthouse had counted the ships for eleven years, and the count was never wrong.",
    "In the winter of the great frost he wrote nothing down, because the ink had frozen in the well.",
    "“You will want a warmer room,” said Mrs. Abernethy, who had brought the lamp and a loaf of bread.",
    "He thanked her & set the loaf on the sill, where the gulls could see it and could not reach it.",
    "A brig called the Zephyrine passed at dusk; she carried quicksilver, figs, and a bear for a museum.",
    "Nobody believed the part about the bear until it was heard from the pier, complaining of the weather.",
    "The tide turned at a quarter past four, as the almanac had said it would, and the harbour emptied.",
    "There is a kind of quiet that belongs only to rooms in which somebody has just stopped speaking.",
    "She wrote 1 < 2 on the slate, looked at it for a long while, and wiped it off with her sleeve.",
    "By the morning the snow had covered the boats, the nets, the steps, and the name over the door.",
)

GATES = (("lr", 0.2), ("momentum", 0.8), ("forget", 0.01), ("weight", 3.0), ("loss", 1.0))


def made_up_text(length: int) -> str:
    """Prose of about `length` characters in paragraphs, with signs that HTML must escape."""
    rng = random.Random(7)
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < length:
        paragraphs.append(" ".join(rng.sample(SENTENCES, rng.randint(3, 6))))
    return "\n\n".join(paragraphs)[:length]


def made_up_surprise(text: str) -> Watched:
    """What looks like surprise: high at the start of rare words, with a slow decay in what accumulates."""
    rng = random.Random(11)
    seen: dict[str, int] = {}
    bits: list[float] = []
    for index, char in enumerate(text):
        context = text[max(0, index - 3) : index + 1]
        seen[context] = seen.get(context, 0) + 1
        start = 2.6 if index and not text[index - 1].isalpha() and char.isalpha() else 0.7
        rare = 2.0 if char in "Zqxjz&<0123456789" else 1.0
        known = 1 + 0.25 * math.log(seen[context])
        bits.append(min(11.0, start * rare * rng.gammavariate(1.1, 1.0) / known))
    momentary = np.array(
        [[0.004 * (b + 0.1) ** 1.4 * rng.uniform(0.6, 1.5) for b in bits] for _ in range(2)], np.float32
    )
    accumulated = np.zeros_like(momentary)
    for t in range(len(text)):
        accumulated[:, t] = 0.93 * accumulated[:, t - 1] * (t > 0) + momentary[:, t]
    gates = {
        name: (low + 0.1 * rng.random() * momentary / momentary.max()).astype(np.float32)
        for name, low in GATES
    }
    memory = {"momentary": momentary, "accumulated": accumulated, **gates}
    return Watched(list(text), np.array(bits, np.float32), {0: memory, 1: memory}, before=20_000)


def wavy(n: int, start: float, end: float, rate: float, noise: float, seed: int) -> list[float]:
    """A noisy exponential fall from `start` to `end`, of shape (n,)."""
    rng = random.Random(seed)
    return [end + (start - end) * math.exp(-rate * i / n) + rng.gauss(0, noise) for i in range(n)]


def make_report(characters: int = 8000) -> DemoReport:
    """A full report with every part present."""
    lengths = [1024 * 2**k for k in range(2, 11)]
    found = [200, 200, 199, 200, 198, 197, 197, 194, 191]
    twin_found = [198, 121, 58, 24, 9, 3, 2, 1, 0]
    read = [1048576 * i / 299 for i in range(300)]
    train = [float(40000 * i) for i in range(1, 501)]
    place = [4096.0 * i for i in range(1, 101)]
    conditions = [
        ("learning while reading", "memory", 2.31, 1.842, 3.2),
        ("memory reset every segment", "", 2.32, 2.046, 1.2),
        ("frozen from the start", "", 2.38, 2.121, 0.6),
        ("frozen after warming up", "", 2.20, 1.937, 1.1),
        ("attention-only twin", "twin", 2.33, 2.098, 0.9),
    ]
    held_out = []
    for seed, (name, role, first, last, rate) in enumerate(conditions):
        ys = wavy(100, first, last, 1.5 + rate, 0.018, seed)
        learns = role == "memory"
        held_out.append(
            Curve(
                name,
                place,
                ys,
                [y - 0.04 for y in ys] if learns else [],
                [y + 0.04 for y in ys] if learns else [],
                role=role,
            )
        )
    text = made_up_text(characters)

    def accuracy(name: str, role: str, correct: list[int]) -> Curve:
        ends = [wilson(k, 200) for k in correct]
        low, high = ([100 * end[side] for end in ends] for side in (0, 1))
        return Curve(
            name, list(map(float, lengths)), [k / 2 for k in correct], low, high, [200] * len(correct), role
        )

    return DemoReport(
        title="A memory that learns while it reads",
        models=[
            ModelCard("titans-mac-small", 4718592, "memory", "attention window 512, memory of 2 layers"),
            ModelCard("attention-only twin", 4702208, "twin", "the same blocks, the memory taken out"),
            ModelCard("reader", 512345, "memory", "titans-mag, 123 steps in this run"),
        ],
        date="1 January 2000 (test data)",
        commands=["pip install miras-torch", "miras demo --seed 0 --out report.html"],
        versions={"miras": "0.0.0", "torch": "0.0.0", "python": "3.11.0"},
        timings=[("act one", 412.7), ("act two", 1893.2), ("look", 8.31)],
        hardware="a made-up processor, 2 threads",
        headline=[
            HeadlineRow("Needle after 1,048,576 bytes", "95.5 %", "twin 0.0 %", "200 trials, made up"),
            HeadlineRow("Held-out book", "1.891 bits/byte", "2.113 for the twin", "lower is better"),
            HeadlineRow("Process memory", "+3.1 MB", "first to last byte of a million", "does not grow"),
        ],
        needle=NeedleAct(
            needle="Remember this: the pass word of the harbour gate is 58213, and it is not written down.",
            key="harbour gate",
            value="58213",
            answer="58213",
            twin_answer="40170",
            question="the pass word of the harbour gate is",
            haystack="The fog is grey. The fog is thick.",
            needle_position=73204,
            twin_window=512,
            bytes_read=1048576,
            seconds=407.31,
            process_memory=Curve("process memory", read, wavy(300, 590, 608, 9, 0.8, 21), role="memory"),
            write_rate=Curve("mean write rate", read, wavy(300, 0.31, 0.118, 5, 0.006, 22), role="memory"),
            memory_norm=Curve("norm", read, wavy(300, 4.1, 17.6, 4, 0.15, 23), role="memory"),
            watched_of=48,
            retrained=False,
            accuracy=[
                accuracy("with memory", "memory", found),
                accuracy("attention-only twin", "twin", twin_found),
            ],
            chance=0.001,
            command="miras evaluate needle --lengths 4096..1048576 --trials 200",
            others=[
                Haystack("a novel", 16384, 71.5, 0.0, 200),
                Haystack("lorem ipsum", 16384, 93.0, 0.5, 200),
            ],
            notes=["The needle is drawn anew for every seed; this page is test data."],
        ),
        learning=LearningAct(
            loss=[
                Curve("with memory", train, wavy(500, 5.4, 1.92, 11, 0.03, 31), role="memory"),
                Curve("attention-only twin", train, wavy(500, 5.4, 2.03, 11, 0.03, 32), role="twin"),
            ],
            loss_x="training bytes",
            held_out=held_out,
            averages=[
                ConditionAverage("learning while reading", 1.8913, "the memory writes"),
                ConditionAverage("memory reset every segment", 2.0721, "writes, but forgets each segment"),
                ConditionAverage("frozen from the start", 2.1334, "never writes"),
                ConditionAverage("frozen after warming up", 1.9517, "writes in the first quarter only"),
                ConditionAverage("attention-only twin", 2.1129, "no memory at all"),
            ],
            fair_reading=[
                "One book and one seed: the spread between books is larger than the spread shown here.",
                "Resetting still writes inside a segment, so it is not the same as having no memory.",
                "The twin has the same window and nearly the same number of parameters.",
            ],
            book="A Made-Up Book, 409,600 bytes",
            generated=GeneratedText(
                prompt="The keeper of the lighthouse had counted the ships for eleven years, and ",
                continuation="when the count was done he put out the lamp and went down to the boats.\n\n"
                "“There is one too many,” he said, and <nobody> & no one answered him from the water.",
                settings="temperature 0.8, top-p 0.95, seed 0",
            ),
            saved=SavedMemory(
                "memory-after-book.safetensors",
                2359808,
                0.0,
                "Logits of the next 2,048 bytes, read with the memory kept and with it loaded.",
            ),
        ),
        surprise=SurpriseAct(made_up_surprise(text), "A Made-Up Book, characters 20,001 to 28,000"),
    )


@pytest.fixture(scope="session")
def report() -> DemoReport:
    """The full made-up report."""
    return make_report()
