"""Text, tokens, batches and tasks: numpy in, numpy out, and nothing of the rest of the package."""

from miras.data.batches import Batch, Lanes
from miras.data.needle import Curriculum, NeedleSample, NeedleTask, score
from miras.data.novel import Novel, load_novel
from miras.data.text import Document, read_documents
from miras.data.tokens import ByteTokenizer, FileTokenizer, TokenFile, Tokenizer, load_tokenizer, prepare

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Curriculum",
    "Document",
    "FileTokenizer",
    "Lanes",
    "NeedleSample",
    "NeedleTask",
    "Novel",
    "TokenFile",
    "Tokenizer",
    "load_novel",
    "load_tokenizer",
    "prepare",
    "read_documents",
    "score",
]
