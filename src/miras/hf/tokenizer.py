"""Tokenizers of models for `transformers`."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from miras.data.tokens import TOKENIZER_CONFIG, ByteTokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The 256 byte values as tokens, the ids of `ByteTokenizer`; pads on the left with 255, which
    never occurs in UTF-8.

    Adds no special tokens. Tools that ask for start and end tokens get 2 and 3, as in ASCII.
    """
    backend = Tokenizer.from_str(ByteTokenizer().to_json().decode())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENIZER_CONFIG)


class MirasTokenizer(PreTrainedTokenizerFast):
    """The tokenizer that `AutoTokenizer` uses for a folder without a tokenizer class: its
    tokenizer.json, or bytes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer of a folder; bytes if it has none, as in the commands."""
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            return byte_tokenizer()
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
