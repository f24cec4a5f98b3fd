"""A session is a stream with a past: it reads as a stream does, and forks, marks and rewinds to the bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import miras
from miras.core.observe import observe
from miras.data.tokens import ByteTokenizer
from miras.nn.lm import LM
from miras.session.learning import Learning
from miras.session.session import Session
from miras.stream import generate, read
from session.helpers import equal, logits

Make = Callable[..., LM]


def ids(text: bytes) -> np.ndarray:
    return ByteTokenizer().encode(text)


def test_it_is_in_the_root():
    assert miras.Session is Session


@pytest.mark.parametrize("name", ["titans-mag", "titans-mac", "titans-lmm", "transformer"])
def test_feeding_is_reading(tiny: Make, text: bytes, name: str):
    model = tiny(name, **({"window_size": None} if name == "transformer" else {}))
    session = Session(model, ByteTokenizer())
    fed = [
        session.feed(text[:101]),
        session.feed(ids(text[101:180])),
        session.feed(iter([ids(text[180:200])])),
    ]
    first = read(model, ids(text[:101]))
    second = read(model, ids(text[101:180]), first.state)
    third = read(model, ids(text[180:200]), second.state)
    for part, wanted in zip(fed, (first, second, third), strict=True):
        np.testing.assert_array_equal(part.losses, wanted.losses[0])
        assert part.loss == pytest.approx(np.nanmean(wanted.losses, dtype=np.float64))
    assert equal(session.now.state, third.state)
    assert bytes(fed[0].tokens) == text[:101]
    assert session.tokens == 200


def test_episodes_say_what_was_read(session: Session, text: bytes):
    fed = session.feed(text[:100], "one")
    session.generate(7)
    session.feed(text[100:130])
    one, two = session.now.episodes
    assert (one.name, one.start, one.tokens, one.scored, bytes(one.kept)) == ("one", 0, 100, 99, text[:40])
    assert one.loss == pytest.approx(float(np.nanmean(fed.losses, dtype=np.float64)))
    assert (two.name, two.start, two.tokens, bytes(two.kept)) == ("episode 2", 107, 30, text[100:130])
    assert one.time.endswith("+00:00") and session.now.days == 1


def test_an_open_episode_takes_all_that_is_said(session: Session, text: bytes):
    with session.episode("talk"):
        session.feed(text[:10])
        said = list(session.sample(6))
        fed = session.feed(text[10:20])
        for wrong in (lambda: session.feed(b"x", "name"), session.fork, lambda: session.mark("a")):
            with pytest.raises(ValueError, match="'talk' is open"):
                wrong()
    (talk,) = session.now.episodes
    assert (talk.name, talk.tokens, talk.scored) == ("talk", 26, 19)  # what it said itself is not scored
    assert bytes(talk.kept) == text[:10] + bytes(said) + text[10:20]
    assert not np.isnan(fed.losses[0])
    with session.episode("nothing"):
        pass
    assert len(session.now.episodes) == 1


def test_the_last_sampled_token_was_read(session: Session, text: bytes):
    session.feed(text[:50])
    before = session.now.state
    made = list(session.sample(9, temperature=0.8, seed=3))
    other = generate(session.base, ids(b""), 9, temperature=0.8, seed=3, state=before)
    assert made == list(other) and equal(session.now.state, other.state) and session.tokens == 59
    again = read(session.base, np.array(made), before)
    np.testing.assert_allclose(session.now.state.logits, again.state.logits, atol=1e-5)
    twin = session.fork()
    said = session.generate(5, temperature=0)
    assert list(twin.sample(5, temperature=0)) and equal(twin.now.state, session.now.state) and said


def test_surprise_is_what_observe_sees(session: Session, text: bytes):
    before = session.now.state
    fed = session.feed(text[:60], observe=True, piece=16)
    with observe() as seen:
        read(session.base, ids(text[:60]), before, piece=16)
    assert list(fed.surprise()) == ["layers.0", "layers.1"]
    for kind in ("momentary", "accumulated", "lr.w1"):
        for layer, values in fed.surprise(kind).items():
            assert values.shape == (2, 60)
            assert torch.equal(values, seen[layer][kind][0]) and values.std() > 0
    with pytest.raises(ValueError, match=r"layers\.0 has no 'predictive'; observed were"):
        fed.surprise("predictive")
    with pytest.raises(ValueError, match="observe=True"):
        session.feed(text[60:70]).surprise()


def test_a_fork_never_touches_its_parent(session: Session, text: bytes):
    session.feed(text[:50], "one")
    session.mark("here")
    state = session.now.state
    kept = {name: x.clone() for name, x in state.tensors().items()}
    weights = {name: x.clone() for name, x in session.base.state_dict().items()}
    fork = session.fork()
    fork.feed(text[50:90], learning=Learning(lr=1e-2, segment=8, replay=2))
    fork.generate(5)
    fork.mark("there")
    fork.unmark("here")
    assert session.now.state is state and list(session.marks) == ["here"] and session.tokens == 50
    assert all(torch.equal(kept[name], x) for name, x in state.tensors().items())
    assert all(torch.equal(weights[name], x) for name, x in session.base.state_dict().items())
    assert session.model is session.base and fork.model is not fork.base and fork.tokens == 95
    assert len(session.now.episodes) == 1 and len(fork.now.episodes) == 2
    # And the other way round.
    held = fork.now
    session.feed(text[:20])
    assert fork.now is held


def test_rewinding_is_exact(session: Session, text: bytes):
    session.feed(text[:53], "one")
    session.mark("a")
    then, said = session.now.state, logits(session, text[53:80])
    session.feed(text[53:100], "two", learning=Learning(lr=1e-2, segment=8))
    session.mark("b")
    later = logits(session, text[53:80])
    assert not torch.equal(said, later)
    session.rewind("a")
    assert equal(session.now.state, then) and torch.equal(logits(session, text[53:80]), said)
    assert [e.name for e in session.now.episodes] == ["one"] and session.model is session.base
    session.feed(text[:10], "three")
    session.rewind("b")
    assert torch.equal(logits(session, text[53:80]), later)
    assert [e.name for e in session.now.episodes] == ["one", "two"]


def test_what_has_no_sense_is_refused(session: Session, tiny: Make, text: bytes):
    for wrong, reason in (
        (lambda: session.feed(b""), "nothing to read"),
        (lambda: session.feed(np.array([300])), "token id 300 is outside"),
        (lambda: session.feed(np.zeros((2, 9), dtype=np.int64)), "rows"),
        (lambda: session.generate(3), "the prompt is empty"),
        (lambda: session.rewind("no"), "the session has no mark 'no'; it has no marks yet"),
        (lambda: session.mark(""), "the name of a mark must not be empty"),
        (lambda: Session(session.base, session.tokenizer, keep=-1), "keep must be at least 0"),
        (lambda: Session(tiny(vocab_size=100), ByteTokenizer()), "256 ids, the model only 100"),
        (lambda: Learning(lr=-1), "lr must be at least 0, got -1"),
        (lambda: Learning(lr=float("nan")), "lr must be at least 0, got nan"),
        (lambda: Learning(segment=1), "segment must be at least 2"),
        (lambda: Learning(clip=0), "clip must be positive"),
    ):
        with pytest.raises(ValueError, match=reason):
            wrong()
    assert session.tokens == 0 and session.now.episodes == ()
    session.mark("a")
    with pytest.raises(ValueError, match="the mark 'a' already exists"):
        session.mark("a")
    with pytest.raises(ValueError, match="no mark 'b'; its marks are a"):
        session.unmark("b")


def test_ctrl_c_keeps_what_was_read(session: Session, text: bytes):
    def stop(part: object) -> None:
        if session.tokens == 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.feed(text[:100], "cut", piece=16, progress=stop)
    (cut,) = session.now.episodes
    assert (cut.tokens, cut.scored, bytes(cut.kept)) == (48, 47, text[:40]) and cut.after is not None
    assert equal(session.now.state, read(session.base, ids(text[:48]), piece=16).state)
    session.feed(text[48:60])
    assert session.tokens == 60
