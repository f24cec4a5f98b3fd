"""The tokenizers of models as `transformers` takes them."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from miras.data.tokens import TOKENIZER_CONFIG, ByteTokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The 256 byte values as tokens, the ids of `ByteTokenizer`; pads on the left with 255, which no UTF-8 has.

    Nothing is added to a text. Tools that ask for tokens of its start and end get 2 and 3, as ASCII has them.
    """
    backend = Tokenizer.from_str(ByteTokenizer().to_json().decode())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENIZER_CONFIG)


class MirasTokenizer(PreTrainedTokenizerFast):
    """What `AutoTokenizer` takes for a folder that names no tokenizer's class: its tokenizer.json, or bytes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer of a folder; bytes where it has none, as the commands take it."""
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            return byte_tokenizer()
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
