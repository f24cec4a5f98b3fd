"""The slow loop: nothing at lr 0, one AdamW step per segment otherwise, and what it learned is kept to the bit."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from miras.data.tokens import ByteTokenizer
from miras.nn.folder import weights
from miras.nn.lm import LM
from miras.session.learning import Learner, Learning, difference, learned
from miras.session.moment import Reservoir
from miras.session.session import Session
from session.helpers import equal, logits

Make = Callable[..., LM]


def test_lr_0_changes_nothing(session: Session, text: bytes, tmp_path: Path):
    other = session.fork()
    plain = session.feed(text[:110], piece=16)
    fed = other.feed(text[:110], learning=Learning(lr=0, segment=16))
    np.testing.assert_array_equal(plain.losses, fed.losses)
    assert equal(session.now.state, other.now.state) and other.now.delta == {}
    assert other.model is other.base and other.now.episodes[-1].learned == 7
    other.save(tmp_path / "s.miras")
    found = Session.load(tmp_path / "s.miras", session.base, session.tokenizer)
    assert torch.equal(logits(found, text[110:150]), logits(session, text[110:150]))


def test_a_segment_is_one_step_of_adamw_behind_the_state_before_it(session: Session, text: bytes):
    """By hand: the loss of the second segment from the carried state, and the step it makes."""
    model, learning = session.base, Learning(lr=1e-3, segment=8, weight_decay=0, clip=1e9)
    other = session.fork()
    session.feed(text[:16], learning=learning)

    mine = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    state = other.now.state
    for at in (0, 8):
        ids = torch.tensor(list(text[at : at + 8]))[None]
        said, _ = mine(ids, state)
        optimizer.zero_grad()
        F.cross_entropy(said[0, :-1], ids[0, 1:]).backward()
        with torch.no_grad():
            _, after = mine(ids, state)  # read with the weights before their step
        optimizer.step()
        state = after
    for name, x in weights(mine).items():
        torch.testing.assert_close(weights(session.model)[name], x, atol=1e-6, rtol=1e-5)
    assert max(float(d.abs().max()) for d in session.now.delta.values()) == pytest.approx(2e-3, rel=0.05)


def test_learning_makes_the_text_likelier(session: Session, text: bytes):
    line = text[:64]
    before = session.fork().feed(line).loss
    for _ in range(4):
        session.feed(line, learning=Learning(lr=1e-2, segment=32))
    after = (
        Session(session.model, session.tokenizer).feed(line).loss
    )  # a fresh memory: the weights learned it
    assert before is not None and after is not None and after < before - 0.5


def test_what_was_learned_survives_saving_with_identical_logits(
    session: Session, text: bytes, tmp_path: Path
):
    base = {name: x.clone() for name, x in session.base.state_dict().items()}
    for at in (0, 50):
        session.feed(text[at : at + 50], learning=Learning(lr=1e-3, segment=16, replay=2))
        assert session.model is not session.base
        session.save(tmp_path / "s.miras")
        session = Session.load(tmp_path / "s.miras", session.base, session.tokenizer)
    twin = Session.load(tmp_path / "s.miras", session.base, session.tokenizer)
    fork = session.fork()
    assert torch.equal(logits(session, text[100:150]), logits(twin, text[100:150]))
    assert not torch.equal(logits(twin, text[100:150]), logits(_forgetful(twin), text[100:150]))
    session.save(tmp_path / "again.miras")
    twin = Session.load(tmp_path / "again.miras", session.base, session.tokenizer)
    for each in (session, twin, fork):
        each.feed(text[100:130], piece=16)
    assert equal(session.now.state, twin.now.state) and equal(session.now.state, fork.now.state)
    assert all(torch.equal(base[name], x) for name, x in session.base.state_dict().items())


def _forgetful(session: Session) -> Session:
    """The same memory with the base model's weights."""
    other = session.fork()
    other.model = other.base
    return other


def test_the_live_weights_are_those_that_loading_gives(session: Session, text: bytes):
    session.feed(text[:60], learning=Learning(lr=1e-3, segment=16))
    again = learned(session.base, session.now.delta)
    assert all(torch.equal(x, weights(again)[n]) for n, x in weights(session.model).items())
    assert difference(session.base, session.base) == {}
    assert learned(session.base, {}) is session.base


def test_tied_weights_stay_tied(tiny: Make, text: bytes):
    session = Session(tiny(tie_word_embeddings=True), ByteTokenizer())
    session.feed(text[:40], learning=Learning(lr=1e-3, segment=16))
    assert session.model.lm_head.weight is session.model.model.embed_tokens.weight
    assert "lm_head.weight" not in session.now.delta and "model.embed_tokens.weight" in session.now.delta


def test_a_replayed_segment_counts_with_a_fresh_memory(session: Session, text: bytes):
    """Both segments' losses, over their tokens together."""
    model = session.base
    session.feed(text[:20])
    state = session.now.state
    new, old = np.array(list(text[20:29])), np.array(list(text[:5]))
    learner = Learner(model, Learning(lr=0, segment=9, clip=1e9))
    learner.step([(new, state), (old, None)])
    mine = copy.deepcopy(model)
    losses = []
    for ids, before in ((new, state), (old, None)):
        ids = torch.from_numpy(ids)[None]
        losses.append(F.cross_entropy(mine(ids, before)[0][0, :-1], ids[0, 1:], reduction="sum"))
    (sum(losses) / 12).backward()  # pyright: ignore
    for (name, a), b in zip(learner.model.named_parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert learner.model.model.layers[0].mixer.memory.A0.w1.grad.abs().max() > 0  # pyright: ignore


def test_a_new_segment_is_learned_with_a_past_one(
    session: Session, text: bytes, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    monkeypatch.setattr(Learner, "step", lambda self, segments: seen.append(segments))
    session.feed(text[:8])
    state = session.now.state
    session.feed(text[8:32], learning=Learning(segment=8, replay=2))
    ((new, before),) = seen[0]
    assert bytes(new.astype(np.uint8)) == text[8:16] and before is state
    for n, ((new, before), (old, fresh)) in enumerate(seen[1:], 1):
        assert bytes(new.astype(np.uint8)) == text[8 + 8 * n : 16 + 8 * n] and before.tokens.tolist() == [
            8 + 8 * n
        ]
        assert bytes(old) in [text[8 + 8 * m : 16 + 8 * m] for m in range(n)] and fresh is None
    assert len(seen) == 3


def test_the_reservoir_is_bounded_fair_and_saved_with_the_session(session: Session, text: bytes):
    session.feed(text[:80], learning=Learning(lr=0, segment=8, replay=3))
    past = session.now.past
    assert past.seen == 10 and len(past.segments) == 3
    assert all(bytes(segment) in text[:80] and len(segment) == 8 for segment in past.segments)
    session.feed(text[80:96], learning=Learning(lr=0, segment=8))
    assert session.now.past is past  # without replay it stays as it is


def test_every_segment_has_the_same_chance_to_be_kept(monkeypatch: pytest.MonkeyPatch):
    """Each of 12 is among the 3 with probability 1/4; over 2000 trials the deviation is 0.01."""
    random = np.random.default_rng(0)
    monkeypatch.setattr(Reservoir, "_random", lambda self: random)
    counts = np.zeros(12)
    for _ in range(2000):
        sample = Reservoir()
        for segment in range(12):
            sample = sample.with_segment(np.array([segment], dtype=np.uint8), 3)
        counts[[int(kept[0]) for kept in sample.segments]] += 1
    assert counts.sum() == 6000 and np.abs(counts / 2000 - 0.25).max() < 0.04


def test_a_number_that_is_none_stops_learning_and_keeps_the_session(session: Session, text: bytes):
    with torch.no_grad():
        session.base.lm_head.weight[0, 0] = torch.inf
    before = session.now
    with pytest.raises(ValueError, match="non-finite"):
        session.feed(text[:40], learning=Learning(segment=16))
    assert session.now.state is before.state and session.now.episodes == () and session.now.delta == {}


def test_ctrl_c_keeps_what_was_learned(session: Session, text: bytes, tmp_path: Path):
    def stop(part: object) -> None:
        if session.tokens == 32:
            raise KeyboardInterrupt

    whole = session.fork()
    with pytest.raises(KeyboardInterrupt):
        session.feed(text[:80], "cut", learning=Learning(lr=1e-3, segment=16), progress=stop)
    whole.feed(text[:32], "cut", learning=Learning(lr=1e-3, segment=16))
    assert session.now.episodes[-1].learned == 2
    assert torch.equal(logits(session, text[32:60]), logits(whole, text[32:60]))
