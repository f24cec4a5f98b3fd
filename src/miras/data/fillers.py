"""Filler to hide needles in: kinds of text, generated from a seed or taken from a book.

A model trained on one kind learns that kind, not the needle. So `TRAIN` has many kinds, and
`HELDOUT` has others, for evaluation only, which no kind in `TRAIN` generates.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from miras.data.novel import load_novel
from miras.data.text import read_documents

Rng = np.random.Generator

NOISE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
"""The filler of RULER."""

SENTENCE = re.compile(rb"[.!?]['\")]*\s+(?=\S)")
WORD = re.compile(rb"\s+(?=\S)")


def _split(text: str, by: str = " ") -> tuple[str, ...]:
    return tuple(text.split(by))


class Filler(ABC):
    """A kind of text without end."""

    @abstractmethod
    def text(self, size: int, rng: Rng) -> bytes:
        """`size` bytes of it, depending only on the state of `rng`."""


@dataclass(frozen=True)
class Book(Filler):
    """A part of one text from a random sentence (or else word) on, wrapping around at its end."""

    source: bytes

    def text(self, size: int, rng: Rng) -> bytes:
        source = self.source
        at = int(rng.integers(len(source)))
        ahead = source[at : at + 1000]
        ahead += source[: 1000 - len(ahead)]
        found = SENTENCE.search(ahead) or WORD.search(ahead)
        start = (at + found.end()) % len(source) if found else 0
        copies = -(-(start + size) // len(source))
        if copies <= 1:
            return source[start : start + size]
        return (source[start:] + source * (copies - 1))[:size]


@dataclass(frozen=True)
class Chapters(Filler):
    """The embedded novel: the part to train on, or the chapters held out."""

    heldout: bool = False

    def text(self, size: int, rng: Rng) -> bytes:
        return _novel(self.heldout).text(size, rng)


@dataclass(frozen=True)
class Shelf(Filler):
    """One of several books, with equal probability."""

    books: tuple[Book, ...]

    def text(self, size: int, rng: Rng) -> bytes:
        return self.books[rng.integers(len(self.books))].text(size, rng)


@dataclass(frozen=True)
class Cipher(Filler):
    """The embedded novel with its letters substituted, by a different alphabet for every text."""

    alphabets: tuple[str, ...] = (
        "abcdefghijklmnopqrstuvwxyz",
        "αβγδεζηθικλμνξοπρστυφχψωάέ",
        "абвгдежзийклмнопрстуфхцчшщ",
        "aàâbcçdeéèêfghiîjlmnoôpqru",
        "aäbdeéfghijklmnoöprsßtuüvx",
        "אבגדהוזחטיכלמנסעפצקרשתםןףץ",
    )

    def text(self, size: int, rng: Rng) -> bytes:
        plain = _novel(False).text(size, rng).decode(errors="ignore")
        letters = rng.permutation(list(self.alphabets[rng.integers(len(self.alphabets))])).tolist()
        table = dict(zip("abcdefghijklmnopqrstuvwxyz", letters, strict=True))
        # Not every capital is one character: "ß" becomes "SS".
        table |= {small.upper(): other.upper() for small, other in table.items()}
        return plain.translate(str.maketrans(table)).encode()[:size].ljust(size)


@dataclass(frozen=True)
class Language(Filler):
    """Made-up words from syllables specific to each text: as sentences, line by line, or words
    only."""

    onsets: tuple[str, ...] = _split(
        "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kn pl qu sh sk sp st th tr wh ñ ç š ž č ł"
    )
    vowels: tuple[str, ...] = _split("a e i o u y ai ea ie ou oo ä ö ü é è ê á í ó å ø")
    codas: tuple[str, ...] = _split("n r s t l m d ng st nd rt x ck") + ("",) * 12
    marks: tuple[str, ...] = (", ", "; ", ": ", " - ", " ")
    ends: tuple[str, ...] = (". ", ". ", ". ", "! ", "? ", ".\n", '." ')

    def text(self, size: int, rng: Rng) -> bytes:
        words = self.words(int(rng.integers(8, min(300, max(16, size // 6)))), rng)
        # Few words make up most of a text (Zipf), as in any language.
        weights = 1 / np.arange(1, len(words) + 1) ** rng.uniform(0, 1.2)
        count = size // 4 + 8
        drawn = [words[i] for i in rng.choice(len(words), count, p=weights / weights.sum())]
        style = int(rng.integers(4))
        if style == 0:
            return " ".join(drawn).encode()[:size].ljust(size)
        if style == 1:
            return "\n".join(drawn).encode()[:size].ljust(size)
        parts: list[str] = []
        lengths = rng.integers(2, 14, size=count).tolist()
        ends = [self.ends[i] for i in rng.integers(len(self.ends), size=count)]
        marks = [self.marks[i] for i in rng.integers(len(self.marks), size=count)]
        at = made = 0
        while made < size and at < count:
            sentence = drawn[at : at + lengths[at]]
            at += len(sentence)
            half = len(sentence) // 2
            first = " ".join(sentence[:half])
            text = first + (marks[at % count] if half else "") + " ".join(sentence[half:])
            parts.append(text[:1].upper() + text[1:] + ends[at % count])
            made += len(parts[-1])
        return "".join(parts).encode()[:size].ljust(size)

    def words(self, count: int, rng: Rng) -> list[str]:
        """That many words of a made-up language."""
        few = lambda of, n: [of[i] for i in rng.integers(len(of), size=n)]  # noqa: E731
        onsets, vowels = few(self.onsets, int(rng.integers(5, 16))), few(self.vowels, int(rng.integers(2, 8)))
        codas = few(self.codas, int(rng.integers(2, 8)))
        number = rng.integers(1, 4, size=count)
        draws = rng.integers(1 << 30, size=(int(number.sum()), 3)).tolist()
        syllables = [
            onsets[a % len(onsets)] + vowels[b % len(vowels)] + codas[c % len(codas)] for a, b, c in draws
        ]
        ends = np.cumsum(number).tolist()
        return ["".join(syllables[end - n : end]) for end, n in zip(ends, number.tolist(), strict=True)]


@dataclass(frozen=True)
class Sentences(Filler):
    """A few short English sentences from a grammar, repeated in order or shuffled."""

    subjects: tuple[str, ...] = _split(
        "The boat|A river|My aunt|The old clock|Our teacher|The cat|A stranger|The market|The key|Her letter|"
        "The second door|A red kite|The radio|This road|The magic lamp|A special guest|The number|Nobody|Everybody|"
        "The word|The code|What I said|A long list|The answer",
        "|",
    )
    verbs: tuple[str, ...] = _split(
        "is|was|seems|will be|stays|was never|looked|sounds|has become|might be", "|"
    )
    ends: tuple[str, ...] = _split(
        "cold|far away|on the table|quite small|of no use|waiting|special|for sale|late again|in the garden|"
        "what we wanted|broken|very kind|almost done|made of wood|by the sea|a number|for you|the same: nothing|"
        "at home|one of seven|42|magic|lost",
        "|",
    )

    def text(self, size: int, rng: Rng) -> bytes:
        pick = lambda of: of[rng.integers(len(of))]  # noqa: E731
        marks = (". ", ". ", ".\n", "! ", "? ", "; ")
        pool = [
            f"{pick(self.subjects)} {pick(self.verbs)} {pick(self.ends)}{pick(marks)}"
            for _ in range(int(rng.integers(1, 12)))
        ]
        turns = size // min(len(s) for s in pool) // len(pool) + 1
        order = np.tile(np.arange(len(pool)), turns)
        if rng.random() < 0.5:
            order = rng.integers(len(pool), size=len(order) + len(pool))
        return _filled("".join(pool[i] for i in order.tolist()), size)


@dataclass(frozen=True)
class Code(Filler):
    """Lines that look like a program, a table of settings or a log."""

    def text(self, size: int, rng: Rng) -> bytes:
        names = Language(vowels=tuple("aeiou"), onsets=tuple("bcdfghklmnprstvx")).words(20, rng)
        forms = (
            "    {a} = {b}({c}, {n})\n",
            "def {a}({b}, {c}={n}):\n",
            "        return {a}[{n}] + {b}.{c}\n",
            "if ({a} < {n}) {{ {b}->{c}(); }}\n",
            "{a}.{b}: {n}\n",
            '  "{a}": "{b}",\n',
            "// {a} {b} {c}\n",
            "{a}={b};{c}+={n};\n",
            "[{n}] {a}: {b} is {c}\n",
            "<{a} {b}='{n}'>{c}</{a}>\n",
            "for ({a} = 0; {a} < {n}; {a}++)\n",
            "import {a}.{b} as {c}\n\n",
        )
        used = [forms[i] for i in rng.integers(len(forms), size=int(rng.integers(1, 6)))]
        lines: list[str] = []
        made = 0
        # A thousand different lines are enough for one program.
        draws = rng.integers(1 << 20, size=(min(1000, size // 8 + 2), 5)).tolist()
        for form, a, b, c, n in draws:
            if made >= size:
                break
            a, b, c = (names[i % len(names)] for i in (a, b, c))
            lines.append(used[form % len(used)].format(a=a, b=b, c=c, n=n % 10 ** (n % 6 + 1)))
            made += len(lines[-1])
        return _filled("".join(lines), size)


@dataclass(frozen=True)
class Numbers(Filler):
    """Whole and decimal numbers of one to twelve digits, with separators specific to each text."""

    def text(self, size: int, rng: Rng) -> bytes:
        low = int(rng.integers(1, 9))
        lengths = rng.integers(low, low + int(rng.integers(1, 5)), size=size // 3 + 8)
        marks = rng.choice((" ", ", ", "\n", "; ", " + ", "\t", " is ", ": ", ". "), size=2).tolist()
        values = rng.integers(10**12, size=len(lengths)).tolist()
        decimal = int(rng.integers(0, 4)) if rng.random() < 0.4 else 0
        parts: list[str] = []
        made = 0
        for at, (value, n) in enumerate(zip(values, lengths.tolist(), strict=True)):
            if made >= size:
                break
            digits = str(value)[:n]
            tail = f".{value % 10**decimal:0{decimal}}" if decimal else ""
            parts += [digits, tail, marks[at % 5 == 4]]
            made += len(digits) + len(tail) + 1
        return _filled("".join(parts), size)


@dataclass(frozen=True)
class Symbols(Filler):
    """Random printable characters, of few kinds or many, with spaces at random."""

    def text(self, size: int, rng: Rng) -> bytes:
        kinds = rng.permutation(np.arange(33, 127, dtype=np.uint8))[: int(rng.integers(2, 95))]
        found = kinds[rng.integers(len(kinds), size=size)]
        found[rng.random(size) < rng.uniform(0, 0.3)] = 32
        return found.tobytes()


@dataclass(frozen=True)
class Decoys(Filler):
    """Sentences similar to a needle: a key and a value, but never the word "magic"."""

    def text(self, size: int, rng: Rng) -> bytes:
        forms = (
            "The {x} number for {k} is {n}. ",
            "The special {x} of {k} is: {n}. ",
            "What is the {x} word for {k}? It is {w}. ",
            "{k} is: {n}. ",
            "The {x} code is {w}. ",
            "A special number: {n}. ",
            "The {x} word for {w} was {k}. ",
            "One {x} for {k}, {n} for {w}. ",
        )
        words = Language().words(24, rng)
        parts: list[str] = []
        made = 0
        draws = rng.integers(1 << 30, size=(min(1000, size // 12 + 2), 5)).tolist()
        for form, x, k, w, n in draws:
            if made >= size:
                break
            x, k, w = (words[i % len(words)] for i in (x, k, w))
            parts.append(forms[form % len(forms)].format(x=x, k=k, w=w, n=n % 10 ** (n % 7 + 1)))
            made += len(parts[-1])
        return _filled("".join(parts), size)


@dataclass(frozen=True)
class Lorem(Filler):
    """Lorem ipsum: random sentences of its words."""

    words: tuple[str, ...] = _split(
        "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut labore et dolore "
        "magna aliqua enim ad minim veniam quis nostrud exercitation ullamco laboris nisi aliquip ex ea commodo "
        "consequat duis aute irure in reprehenderit voluptate velit esse cillum eu fugiat nulla pariatur excepteur "
        "sint occaecat cupidatat non proident sunt culpa qui officia deserunt mollit anim id est laborum"
    )

    def text(self, size: int, rng: Rng) -> bytes:
        parts: list[str] = ["Lorem ipsum dolor sit amet, consectetur adipiscing elit. "]
        made = len(parts[0])
        drawn = rng.integers(len(self.words), size=(size // 24 + 2, 12)).tolist()
        lengths = rng.integers(4, 13, size=len(drawn)).tolist()
        for row, n in zip(drawn, lengths, strict=True):
            if made >= size:
                break
            words = [self.words[i] for i in row[:n]]
            cut = n // 2
            text = " ".join(words[:cut]) + (", " if n > 7 else " ") + " ".join(words[cut:])
            parts.append(text.capitalize() + (". " if n % 3 else ".\n"))
            made += len(parts[-1])
        return _filled("".join(parts), size)


@dataclass(frozen=True)
class Digits(Filler):
    """A table of random digits, 70 per line, without separators."""

    def text(self, size: int, rng: Rng) -> bytes:
        found = rng.integers(48, 58, size=size, dtype=np.uint8)
        found[70::71] = 10
        return found.tobytes()


@dataclass(frozen=True)
class Ledger(Filler):
    """Dates, times, places and sums of money, line by line."""

    def text(self, size: int, rng: Rng) -> bytes:
        draws = rng.integers(1 << 30, size=(size // 40 + 1, 8)).tolist()
        lines = [
            f"{1990 + y % 60}-{1 + m % 12:02}-{1 + d % 28:02} {h % 24:02}:{s % 60:02} no. {a % 10**7:07} "
            f"${c % 10**6 / 100:,.2f} ({f % 100}%)\n"
            for y, m, d, h, s, a, c, f in draws
        ]
        return _filled("".join(lines), size)


FILLERS: dict[str, Filler] = {
    "novel": Chapters(),
    "cipher": Cipher(),
    "language": Language(),
    "sentences": Sentences(),
    "code": Code(),
    "numbers": Numbers(),
    "symbols": Symbols(),
    "decoys": Decoys(),
    "noise": Book(NOISE),
    "chapters": Chapters(heldout=True),
    "lorem": Lorem(),
    "digits": Digits(),
    "ledger": Ledger(),
}
"""Every kind that the package generates, by name."""

TRAIN = ("novel", "cipher", "language", "sentences", "code", "numbers", "symbols", "decoys")
HELDOUT = ("noise", "chapters", "lorem", "digits", "ledger")


@dataclass(frozen=True)
class Mixture(Filler):
    """One of several kinds for each text; with probability `switch` it changes to another one
    somewhere."""

    kinds: tuple[Filler, ...]
    switch: float = 0.2

    def text(self, size: int, rng: Rng) -> bytes:
        one, other = (self.kinds[i] for i in rng.integers(len(self.kinds), size=2))
        cut = int(rng.integers(size + 1)) if rng.random() < self.switch else size
        return one.text(cut, rng) + (other.text(size - cut, rng) if cut < size else b"")


def mixture(books: Sequence[bytes] = ()) -> Mixture:
    """Every kind of `TRAIN`, and, if there are books, books as often as all of these together."""
    kinds = tuple(FILLERS[name] for name in TRAIN)
    shelf = (Shelf(tuple(Book(text) for text in books)),) * len(kinds) if books else ()
    return Mixture(kinds + shelf)


def read_books(folder: Path) -> list[bytes]:
    """Every text of at least 10,000 bytes in a folder (files and archives, compressed or not),
    ordered by name.

    Raises ValueError if there is none.
    """
    found = [d.data for d in read_documents([folder]) if len(d.data) >= 10_000]
    if not found:
        raise ValueError(f"{folder} holds no text of 10,000 bytes or more; name a folder of books")
    return found


@cache
def _novel(heldout: bool) -> Book:
    novel = load_novel()
    return Book(novel.heldout if heldout else novel.train)


def _filled(text: str, size: int) -> bytes:
    """The first `size` bytes of a text, repeated if it is too short."""
    data = text.encode()
    return (data * (size // max(1, len(data)) + 1))[:size]
