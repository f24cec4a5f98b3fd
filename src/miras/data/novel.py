"""A novel that ships with the package, so that training needs no download."""

import lzma
from dataclasses import dataclass
from importlib.resources import files

HELDOUT_FROM = b"\nChapter LIV\n"  # the last six of 59 chapters, 10.7 % of the text


@dataclass(frozen=True)
class Novel:
    """A text in the public domain, split at a chapter heading: one part for training, one for
    evaluation."""

    title: str
    author: str
    train: bytes
    heldout: bytes


def load_novel() -> Novel:
    """*Great Expectations*, 0.99 MB of UTF-8 (source: assets/README.md)."""
    packed = files("miras.data").joinpath("assets", "great_expectations.txt.xz").read_bytes()
    text = lzma.decompress(packed)
    cut = text.index(HELDOUT_FROM) + 1
    return Novel("Great Expectations", "Charles Dickens", text[:cut], text[cut:])
