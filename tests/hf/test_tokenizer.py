"""The tokenizer beside a model: the ids of `ByteTokenizer` for every text, or those of the file it learned with."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from hf.conftest import build
from miras.cli import main
from miras.data.tokens import ByteTokenizer, FileTokenizer, load_tokenizer
from miras.hf import byte_tokenizer
from miras.nn.folder import save_model

OURS, THEIRS = ByteTokenizer(), byte_tokenizer()


@given(words=st.text(max_size=60))
@example(words="ÿ Ā Ġ <0x00> \x00\x7f\xad \u2028 é漢🙂 \r\n\t  ")
@example(words="".join(map(chr, range(0x180))))
def test_every_text_has_the_ids_of_its_bytes(words):
    ids = THEIRS(words)["input_ids"]
    assert ids == OURS.encode(words).tolist()
    assert THEIRS.decode(ids) == words


@given(data=st.binary(max_size=40))
def test_bytes_that_are_no_text_are_decoded_alike(data):
    assert THEIRS.decode(list(data)) == OURS.decode(np.frombuffer(data, dtype=np.uint8))


def test_padding_is_on_the_left_and_masked():
    made = THEIRS(["It", "It was"], padding=True, return_tensors="pt")
    assert made["input_ids"].tolist() == [[255] * 4 + [73, 116], list(b"It was")]
    assert made["attention_mask"].tolist() == [[0] * 4 + [1, 1], [1] * 6]
    assert set(made) == {"input_ids", "attention_mask"}
    assert len(THEIRS) == THEIRS.vocab_size == 256 and THEIRS.pad_token_id == 255
    assert THEIRS.batch_decode(made["input_ids"], skip_special_tokens=True) == ["It", "It was"]


def test_it_survives_files_and_is_known_again(tmp_path):
    THEIRS.save_pretrained(tmp_path / "a")
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert again("ÿĀé")["input_ids"] == list("ÿĀé".encode()) and again.pad_token_id == 255
    assert load_tokenizer(tmp_path / "a") == OURS  # also as `transformers` writes it
    (tmp_path / "b.json").write_bytes(OURS.to_json())
    assert load_tokenizer(tmp_path / "b.json") == OURS
    assert FileTokenizer(tmp_path / "b.json").encode("é\n").tolist() == list("é\n".encode())


def trained() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(["the cat sat on the mat, the cat sat"] * 4, trainer)
    return made


def test_a_tokenizer_of_256_other_tokens_is_not_taken_for_bytes(tmp_path):
    plain = json.loads(OURS.to_json())
    plain["model"]["vocab"]["a"], plain["model"]["vocab"]["b"] = 98, 97
    (tmp_path / "swapped.json").write_text(json.dumps(plain))
    assert load_tokenizer(tmp_path / "swapped.json").encode("ab").tolist() == [98, 97]


@pytest.mark.parametrize("spelled", ["bytes", "bpe"])
def test_training_leaves_its_tokenizer_beside_the_model(tmp_path, monkeypatch, capsys, spelled):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and was content. " * 40)
    line = "train --out run --preset titans-mag --steps 1 --batch-size 1 --seq-len 16 --text text.txt"
    line += " --hidden-size 16 --num-heads 2 --num-hidden-layers 1 --chunk-size 4 --window-size 8 --num-persistent 2"
    if spelled == "bpe":
        (tmp_path / "bpe.json").write_text(trained().to_str())
        line += " --tokenizer bpe.json"
    assert main(line.split()) == 0, capsys.readouterr().err
    found = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    wanted = OURS if spelled == "bytes" else load_tokenizer(tmp_path / "bpe.json")
    words = "the cat sat, ÿ!"
    assert found(words)["input_ids"] == wanted.encode(words).tolist()
    assert load_tokenizer(tmp_path / "run" / "model").encode(words).tolist() == wanted.encode(words).tolist()
    assert isinstance(load_tokenizer(tmp_path / "run" / "model"), type(wanted))


def test_a_folder_without_a_tokenizer_reads_bytes(tmp_path):
    save_model(build(), tmp_path / "plain")
    found = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert found("é", return_tensors="pt")["input_ids"].tolist() == [[195, 169]]
    save_model(build(vocab_size=300), tmp_path / "old", {"tokenizer.json": trained().to_str().encode()})
    found = AutoTokenizer.from_pretrained(tmp_path / "old")
    assert found("the cat")["input_ids"] == trained().encode("the cat").ids
    assert torch.tensor(found("the cat")["input_ids"]).max() > 255
