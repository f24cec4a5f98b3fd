"""What moved and what is left, against numbers worked out by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from miras.core.memory import Matrix
from miras.core.retention import ElasticNet
from miras.core.rule import Rule
from miras.data.novel import load_novel
from miras.data.tokens import ByteTokenizer
from miras.nn.lm import LM, LMState
from miras.session.compare import memories, outer_distance
from miras.session.learning import Learning
from miras.session.session import Session
from miras.stream.run import read

Make = Callable[..., LM]


def by_hand(model: LM, state: LMState | None, text: bytes) -> float:
    """The mean loss of a text's tokens but the first, read token by token without writing."""
    ids = torch.tensor(list(text))
    losses = []
    with torch.no_grad():
        for at, token in enumerate(ids):
            said, state = model(token[None, None], state, write=torch.zeros(1, 1, dtype=torch.bool))
            if at + 1 < len(ids):
                losses.append(F.cross_entropy(said[0], ids[at + 1 : at + 2]).double())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("name", ["titans-mag", "titans-mac"])
def test_recall_is_the_loss_without_writing(tiny: Make, text: bytes, name: str):
    model = tiny(name)
    session = Session(model, ByteTokenizer(), keep=25)
    session.feed(text[:60], "one")
    after_one = session.now.state
    session.feed(text[60:80], "two")
    after_two = session.now.state
    session.feed(text[80:81], "three")
    before = session.now
    one, two, three = session.recall()
    assert session.now is before
    state = session.now.state
    assert (one.name, one.tokens, one.kept, one.base) == ("one", 60, 25, None)
    assert one.now == pytest.approx(by_hand(model, state, text[:25]), abs=1e-5)
    assert one.after == pytest.approx(by_hand(model, after_one, text[:25]), abs=1e-5)
    assert one.fresh == pytest.approx(by_hand(model, None, text[:25]), abs=1e-5)
    assert two.now == pytest.approx(by_hand(model, state, text[60:80]), abs=1e-5)
    assert two.after == pytest.approx(by_hand(model, after_two, text[60:80]), abs=1e-5)
    assert (three.kept, three.now, three.after, three.fresh) == (1, None, None, None)
    assert three.other is None and three.left is None
    assert len({one.now, one.after, one.fresh, two.now, two.after, two.fresh}) == 6


def test_recall_has_a_control_that_read_as_much_of_another_text(tiny: Make):
    model, novel = tiny("titans-mag"), load_novel()
    session = Session(model, ByteTokenizer(), keep=25)
    session.feed(novel.train[:60], "pages that the control would begin with")
    session.feed("Once upon a midnight dreary, ", "not of the novel")
    one, two = session.recall()
    state = {
        name: read(model, np.frombuffer(getattr(novel, name)[:89], np.uint8)).state
        for name in ("train", "heldout")
    }
    assert one.other == pytest.approx(by_hand(model, state["heldout"], novel.train[:25]), abs=1e-5)
    kept = b"Once upon a midnight dreary, "[:25]
    assert two.other == pytest.approx(by_hand(model, state["train"], kept), abs=1e-5)
    assert two.left == pytest.approx(two.other - by_hand(model, session.now.state, kept), abs=1e-5)
    assert Session(model, ByteTokenizer(), keep=0).recall() == []


def test_recall_tells_memory_from_weights(session: Session, text: bytes):
    session.feed(text[:14], "one")
    after_one = session.now.state
    session.feed(text[14:38], "two", learning=Learning(lr=1e-2, segment=8))
    one, _ = session.recall()
    assert one.after == pytest.approx(by_hand(session.base, after_one, text[:14]), abs=1e-5)
    assert one.now == pytest.approx(by_hand(session.model, session.now.state, text[:14]), abs=1e-5)
    assert one.fresh == pytest.approx(by_hand(session.model, None, text[:14]), abs=1e-5)
    assert one.base == pytest.approx(by_hand(session.base, None, text[:14]), abs=1e-5)


def test_nothing_moved_from_a_session_to_itself(session: Session, text: bytes):
    session.feed(text[:50])
    rows = session.diff(session.fork())
    assert [(row.layer, row.weight) for row in rows] == [
        (f"layers.{n}", weight) for n in (0, 1) for weight in ("w1", "w2")
    ]
    assert all(row.distance == row.share == 0 and row.heads == (0, 0) and row.size > 0 for row in rows)
    assert outer_distance(session.model, session.model) == 0


def test_diff_names_the_layer_that_moved_and_how_far(session: Session, text: bytes):
    session.feed(text[:50])
    other = session.fork()
    tensors = session.now.state.tensors()
    (name,) = [n for n in tensors if n.startswith("layers.1") and n.endswith(".A.w2")]
    changed = tensors[name].clone()
    changed[0, 1] *= 1.5  # the second head of one weight of the second layer
    other.now = type(other.now)(session.now.state.with_tensors(tensors | {name: changed}))
    rows = {(row.layer, row.weight): row for row in session.diff(other)}
    row = rows.pop(("layers.1", "w2"))
    learned = tensors[name][0].double()  # A - A_0, of which half is added
    start = session.model.state_dict()["model.layers.1.mixer.memory.A0.w2"]
    heads = (learned + start).flatten(1).norm(dim=1)
    moved = float(learned[1].norm()) / 2
    assert row.heads == pytest.approx((0, moved / float(heads[1])))
    assert row.size == pytest.approx(float(heads.norm())) and row.distance == pytest.approx(moved)
    assert row.share == pytest.approx(moved / float(heads.norm()))
    assert all(row.distance == 0 for row in rows.values())


def test_what_was_fed_moved_every_layer(session: Session, text: bytes):
    session.feed(text[:50])
    other = session.fork()
    other.feed(text[50:150])
    before, after = session.now.state.tensors(), other.now.state.tensors()
    rows = session.diff(other)
    assert len(rows) == 4
    for row in rows:
        name = f"{row.layer}.memory.memory.A.{row.weight}"
        assert row.distance == pytest.approx(float((after[name] - before[name]).norm()), rel=1e-5)
        assert row.share > 0.001 and all(share > 0.001 for share in row.heads)


def test_weights_are_those_that_are_read(tiny: Make, text: bytes):
    """A retention whose weights are not its accumulator: soft-thresholded here."""
    rule = Rule(memory=Matrix(), retention=ElasticNet(gamma=0.1), chunk_size=4)
    session = Session(tiny("titans-lmm", rule=rule), ByteTokenizer())
    session.feed(text[:30])
    A = session.now.state.tensors()["layers.0.memory.A." + next(iter(rule.memory.shapes(2, 2)))]
    (w,) = memories(session.base, session.now.state)["layers.0"].values()
    torch.testing.assert_close(w, A.sign() * (A.abs() - 0.1).clamp_min(0))
    assert (w == 0).any()


def test_wirings_without_memory_have_nothing_to_move(tiny: Make, text: bytes):
    session = Session(tiny("transformer"), ByteTokenizer())
    session.feed(text[:20])
    assert session.diff(session) == [] and session.describe()["memory"] == {}
    mixed = Session(tiny("titans-mag", pattern=("attention", "mag")), ByteTokenizer())
    assert list(mixed.describe()["memory"]) == ["layers.1"]


def test_sessions_of_two_models_are_not_compared(session: Session, tiny: Make):
    other = Session(tiny(seed=1), ByteTokenizer())
    with pytest.raises(ValueError, match=f"different models, {session.hash} and {other.hash}"):
        session.diff(other)


def test_describe(session: Session, text: bytes):
    session.feed(text[:50], "one")
    session.mark("a")
    session.feed(text[50:90], "two", learning=Learning(lr=1e-3, segment=8, replay=2))
    told = session.describe()
    assert told["tokens"] == 90 and told["days"] == 1 and told["model"] == session.hash
    assert [(e["name"], e["start"], e["tokens"], e["kept"], e["learned"]) for e in told["episodes"]] == [
        ("one", 0, 50, 40, 0),
        ("two", 50, 40, 40, 6),  # the first segment ends where a chunk does
    ]
    state = session.now.state
    assert told["marks"] == [{"name": "a", "tokens": 50, "bytes": state.nbytes()}]
    learned = sum(4 * x.numel() for x in session.now.delta.values())
    assert told["bytes"] == {
        "state": state.nbytes(),
        "marks": state.nbytes(),
        "kept texts": 80,
        "learned weights": learned,
        "replay": sum(len(segment) for segment in session.now.past.segments),
    }
    parameters = torch.cat([p.detach().flatten().double() for p in session.base.parameters()])
    now = torch.cat([p.detach().flatten().double() for p in session.model.parameters()])
    assert told["learned"] == pytest.approx(float((now - parameters).norm() / parameters.norm()))
    start = session.base.state_dict()["model.layers.0.mixer.memory.A0.w1"]
    w1 = start + state.tensors()["layers.0.memory.memory.A.w1"]
    assert told["memory"]["layers.0"]["w1"] == pytest.approx(float(w1.norm()))
    assert np.isfinite(list(told["memory"]["layers.1"].values())).all()
