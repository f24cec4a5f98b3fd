from miras.data import load_novel


def test_the_novel_is_whole_and_cut_at_a_chapter():
    novel = load_novel()
    text = novel.train + novel.heldout
    assert (novel.title, novel.author) == ("Great Expectations", "Charles Dickens")
    assert text.decode("utf-8").startswith("GREAT EXPECTATIONS") and len(text) == 991_613
    assert b"\r" not in text and b"\0" not in text
    assert novel.heldout.startswith(b"Chapter LIV\n") and novel.train.endswith(b"\n")
    assert 0.10 < len(novel.heldout) / len(text) < 0.12
    assert novel.heldout.count(b"\nChapter ") == 5
