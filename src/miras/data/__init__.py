"""Text, tokens, batches and tasks: numpy in, numpy out, independent of the rest of the package."""

from miras.data.batches import Batch, Lanes
from miras.data.fillers import FILLERS, HELDOUT, TRAIN, Filler, mixture, read_books
from miras.data.needle import Curriculum, Needle, NeedleSample, NeedleTask, answered, score
from miras.data.novel import Novel, load_novel
from miras.data.text import Document, read_documents
from miras.data.tokens import ByteTokenizer, FileTokenizer, TokenFile, Tokenizer, load_tokenizer, prepare

__all__ = [
    "FILLERS",
    "HELDOUT",
    "TRAIN",
    "Batch",
    "ByteTokenizer",
    "Curriculum",
    "Document",
    "FileTokenizer",
    "Filler",
    "Lanes",
    "Needle",
    "NeedleSample",
    "NeedleTask",
    "Novel",
    "TokenFile",
    "Tokenizer",
    "answered",
    "load_novel",
    "load_tokenizer",
    "mixture",
    "prepare",
    "read_books",
    "read_documents",
    "score",
]
