"""A session: a stream whose memory learns what it is fed; it can be forked, rewound and saved."""

import copy
import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from miras.core.observe import Observation
from miras.core.observe import observe as observation
from miras.data.tokens import Tokenizer, check_tokenizer
from miras.nn.folder import model_hash
from miras.nn.lm import LM, instead_of
from miras.nn.reading import LMState, Piece, Spelling, Tokens, read_pieces
from miras.session import files
from miras.session.compare import Moved, Recalled, loss_of, memories, moved, outer_distance, recalled
from miras.session.learning import Learner, Learning, difference, learned
from miras.session.lock import hold
from miras.session.moment import KEEP, Episode, Ids, Moment, compact, distinct, mean
from miras.store.signals import Held
from miras.stream.files import now
from miras.stream.generation import Generation
from miras.stream.generation import generate as generation


@dataclass(frozen=True, eq=False, repr=False)
class Fed:
    """The result of feeding T tokens.

    tokens (T,); losses (T,): predictive surprise, the loss in nats of each token before it was read
    (NaN for the first token of a new session, which nothing predicts); seen: the observation, if
    requested.
    """

    tokens: Ids
    losses: NDArray[np.float32]
    seen: Observation | None

    def __repr__(self) -> str:
        loss = "nothing predicted" if self.loss is None else f"loss {self.loss:.3f} nats"
        watched = "" if self.seen is None else f", {self.seen!r}"
        return f"Fed({len(self.tokens):,} tokens, {loss}{watched})"

    def _repr_html_(self) -> str:
        seen = "" if self.seen is None else self.seen._repr_html_()
        return f"<p>{html.escape(repr(replace(self, seen=None)))}</p>{seen}"

    @property
    def loss(self) -> float | None:
        """Mean loss in nats per token; None if no token was predicted."""
        return mean(self.losses)

    def surprise(self, kind: str = "momentary") -> dict[str, Tensor]:
        """{layer: (heads, T)}: "momentary" |grad_t|, "accumulated" |S_t|, or another name that
        `observe` knows.

        Raises ValueError if it was not observed.
        """
        if self.seen is None:
            raise ValueError("the memories were not observed: feed with observe=True")
        watched = {layer: self.seen[layer] for layer in self.seen.layers()}
        if wrong := [layer for layer, values in watched.items() if kind not in values]:
            known = ", ".join(watched[wrong[0]])
            raise ValueError(f"{wrong[0]} has no {kind!r}; observed were {known}")
        return {layer: values[kind][0] for layer, values in watched.items()}


class Session:
    """One stream through a model, with its history: fed in episodes, marked, forked, rewound, saved
    and loaded.

    now: its current moment, as one value; marks {name: moment}; base: the model it was made with,
    which never changes; model: the base plus what was learned; keep: tokens kept of each episode;
    folder: the last known folder of the model, a hint in addition to its hash. Raises ValueError if
    the tokenizer has more ids than the model.
    """

    def __init__(self, model: LM, tokenizer: Tokenizer, *, keep: int = KEEP, folder: str = "") -> None:
        if not isinstance(model, LM):
            raise ValueError(
                f"Session: a miras.LM is needed, got a {type(model).__name__}{instead_of(model)}"
            )
        check_tokenizer(tokenizer)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}; a "
                f"session needs the tokenizer that its model was trained with"
            )
        if keep < 0:
            raise ValueError(f"keep must be at least 0 tokens of each episode, got {keep}")
        self.base = self.model = model
        self.tokenizer = tokenizer
        self.keep = keep
        self.folder = folder
        self.hash = model_hash(model)
        self.created = now()
        self.marks: dict[str, Moment] = {}
        # A copy, because an initial state is a view of the model's parameters.
        self.now = Moment(model.initial(1).map(lambda x: x.detach().clone()))
        self._open = False

    def __repr__(self) -> str:
        marks = f", marks {', '.join(map(repr, self.marks))}" if self.marks else ""
        names = [repr(episode.name) for episode in self.now.episodes]
        read = f"{len(names)} episodes, the last {names[-1]}" if names else "nothing read yet"
        return f"Session(model {self.hash}, {self.tokens:,} tokens, {read}{marks})"

    def _repr_html_(self) -> str:
        """For notebooks: a table of episodes."""
        rows = [
            (e.name, e.time, f"{e.tokens:,}", "" if e.loss is None else f"{e.loss:.3f}", f"{len(e.kept):,}")
            for e in self.now.episodes
        ]
        head = ("episode", "begun (UTC)", "tokens", "loss in nats", "kept")
        cells = ["".join(f"<td>{html.escape(x)}</td>" for x in row) for row in rows]
        table = "".join(f"<tr>{each}</tr>" for each in ["".join(f"<th>{x}</th>" for x in head), *cells])
        return f"<p>{html.escape(repr(self))}</p><table>{table}</table>"

    @property
    def tokens(self) -> int:
        """Tokens read so far, including generated ones."""
        return self.now.tokens

    def feed(
        self,
        text: str | bytes | Tokens,
        name: str | None = None,
        *,
        piece: int = 2048,
        observe: bool = False,
        learning: Learning | None = None,
        progress: Callable[[Piece], None] | None = None,
    ) -> Fed:
        """Read a text, its token ids (T,), or an iterator over arrays of ids, and learn from it.

        It becomes an episode of that name, or part of the open one. At most `piece` tokens are read
        per call; `observe` records the memories; with `learning` the outer weights learn too;
        `progress` is called with each piece. If it is interrupted, the session has read whole
        pieces and continues after the last one. Memory: a piece, and 5 to 8 bytes per token. Raises
        ValueError for no tokens, ids outside the vocabulary, and a name inside an open episode.
        """
        if self._open and name is not None:
            raise ValueError(f"episode {self.now.episodes[-1].name!r} is open: call feed without a name")
        ids = self.tokenizer.encode(text) if isinstance(text, str | bytes) else text
        learner = None if learning is None else Learner(self.model, learning)
        kept: list[Ids] = []
        losses: list[NDArray[np.float32]] = []
        with (
            nullcontext() if self._open else self.episode(name),
            observation() if observe else nullcontext() as seen,
        ):
            try:
                for part in self._pieces(ids, piece, learner, learning):
                    kept.append(compact(part.tokens[0], self.base.config.vocab_size))
                    losses.append(part.losses[0])
                    if progress is not None:
                        progress(part)
            finally:
                if learner is not None:
                    with Held():
                        self._adopt(replace(self.now, delta=difference(learner.model, self.base)))
            if not losses:
                raise ValueError("the text is empty: nothing to read")
        return Fed(np.concatenate(kept), np.concatenate(losses), seen)

    def _pieces(
        self, ids: Tokens, piece: int, learner: Learner | None, learning: Learning | None
    ) -> Iterator[Piece]:
        """The pieces of a reading, each added to the session; a learner learns from each after it
        was read."""
        if learner is None or learning is None:
            for part in read_pieces(self.model, ids, self.now.state, piece=piece):
                self._take(part.tokens[0], part.losses[0], part.state)
                yield part
            return
        for part in read_pieces(learner.model, ids, self.now.state, piece=learning.segment):
            # Weights, history and state advance together or not at all.
            with Held():
                segment, past = part.tokens[0], self.now.past
                if len(segment) > 1:
                    old = past.draw() if learning.replay else None
                    learner.step([(segment, self.now.state), *([] if old is None else [(old, None)])])
                    if learning.replay:
                        kept = compact(segment, self.base.config.vocab_size)
                        self.now = replace(self.now, past=past.with_segment(kept, learning.replay))
                    *before, last = self.now.episodes
                    self.now = replace(self.now, episodes=(*before, replace(last, learned=last.learned + 1)))
                self._take(segment, part.losses[0], part.state)
            yield part

    @contextmanager
    def episode(self, name: str | None = None) -> Iterator[None]:
        """Everything fed and generated inside is one episode. Raises ValueError inside another one.

        At its end the loss on its kept tokens is measured with the memory of then, for `recall` to
        compare with; this reads them again, without writing. An empty episode leaves no trace.
        """
        self._closed("another one")
        before = self.now.episodes
        begun = Episode(
            name or f"episode {len(before) + 1}",
            now(),
            self.tokens,
            compact(np.zeros(0, dtype=np.int64), self.base.config.vocab_size),
        )
        try:
            with Held():
                self.now = replace(self.now, episodes=(*before, begun))
                self._open = True
            yield
        finally:
            with Held():
                if self._open:
                    self._end_episode()

    def _end_episode(self) -> None:
        self._open = False
        last = self.now.episodes[-1]
        after = loss_of(self.model, last.kept, self.now.state)
        done = (replace(last, after=after),) if last.tokens else ()
        self.now = replace(self.now, episodes=(*self.now.episodes[:-1], *done))

    def sample(
        self, num_tokens: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[int]:
        """The tokens of a continuation as they are generated, each read (and learned) before the
        next.

        Raises ValueError for invalid values, and if nothing was fed yet.
        """
        nothing = np.zeros(0, dtype=np.int64)
        made = generation(
            self.model,
            nothing,
            num_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            state=self.now.state,
        )
        return self._sampled(made)

    def _sampled(self, made: Generation) -> Iterator[int]:
        for token in made:
            self._take(np.array([token]), np.array([np.nan], dtype=np.float32), made.state)
            yield token

    def generate(
        self, num_tokens: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
    ) -> str:
        """The text of a continuation, which the session reads to its last token. Raises like
        `sample`."""
        spelling = Spelling(self.tokenizer.decode)
        made = self.sample(num_tokens, temperature=temperature, top_p=top_p, seed=seed)
        return "".join(spelling.push(np.array([token])) for token in made) + spelling.rest()

    def recall(self) -> list[Recalled]:
        """What is left of each episode; changes nothing, and reads every kept text three or four
        times."""
        return recalled(self.base, self.model, self.now, self.tokenizer)

    def diff(self, other: "Session") -> list[Moved]:
        """The distance of each layer's memory to another session's, by weight and head.

        Raises ValueError if they have different base models.
        """
        if self.hash != other.hash:
            raise ValueError(
                f"the sessions have different models, {self.hash} and {other.hash}, so they cannot be compared"
            )
        return moved(self.base, self.now.state, other.now.state)

    def describe(self) -> dict[str, Any]:
        """The session in plain values: its history, its marks, its sizes in bytes, |W| of each
        memory."""
        moments = [self.now, *self.marks.values()]
        episodes = distinct(e for m in moments for e in m.episodes)
        pasts = distinct(m.past for m in moments)
        deltas = distinct(m.delta for m in moments)
        return {
            "model": self.hash,
            "folder": self.folder,
            "created": self.created,
            "tokens": self.tokens,
            "days": self.now.days,
            "keep": self.keep,
            "learned": outer_distance(self.base, self.model),
            "bytes": {
                "state": self.now.state.nbytes(),
                "marks": sum(m.state.nbytes() for m in self.marks.values()),
                "kept texts": sum(e.kept.nbytes for e in episodes),
                "learned weights": sum(x.numel() * x.element_size() for d in deltas for x in d.values()),
                "replay": sum(ids.nbytes for past in pasts for ids in past.segments),
            },
            "episodes": [
                {
                    "name": e.name,
                    "time": e.time,
                    "start": e.start,
                    "tokens": e.tokens,
                    "kept": len(e.kept),
                    "loss": e.loss,
                    "learned": e.learned,
                }
                for e in self.now.episodes
            ],
            "marks": [
                {"name": name, "tokens": m.tokens, "bytes": m.state.nbytes()}
                for name, m in self.marks.items()
            ],
            "memory": {
                layer: {name: float(w.double().norm()) for name, w in tree.items()}
                for layer, tree in memories(self.base, self.now.state).items()
            },
        }

    def fork(self) -> "Session":
        """Another session with the same history; the two are independent."""
        self._closed("a fork")
        other = copy.copy(self)
        other.marks = dict(self.marks)
        return other

    def mark(self, name: str) -> None:
        """Mark the current moment with a name. Raises ValueError if the name is taken."""
        self._closed("a mark")
        if not name:
            raise ValueError("the name of a mark must not be empty")
        if name in self.marks:
            raise ValueError(f"the mark {name!r} already exists; choose another name, or drop it first")
        self.marks[name] = self.now

    def unmark(self, name: str) -> None:
        """Delete a mark. Raises ValueError if there is none of that name."""
        self._marked(name)
        del self.marks[name]

    def rewind(self, name: str) -> None:
        """Restore the session at a mark, to the bit; all marks stay, including later ones. Raises
        like `unmark`."""
        self._closed("a rewind")
        self._adopt(self._marked(name))

    def save(self, path: str | Path) -> None:
        """Write the session to one file, atomically, replacing an older one.

        Raises ValueError if another process is writing that session, or if the base model's weights
        have changed since this one began; OSError, naming the path, if it cannot be written: an
        older file then remains.
        """
        path = Path(path)
        if (own := model_hash(self.base)) != self.hash:
            raise ValueError(
                f"{path} is not written: the model was {self.hash} when the session began and is {own} now; give "
                f"a session a model that nothing else trains"
            )
        with Held(), hold(path):
            files.write(
                path,
                self.base,
                files.About(self.hash, self.tokenizer.fingerprint, self.folder, self.created, self.keep),
                [self.now, *self.marks.values()],
                list(self.marks),
            )

    @staticmethod
    def load(path: str | Path, model: LM, tokenizer: Tokenizer) -> "Session":
        """Load the session in a file; a state saved by `miras stream` becomes one without history.

        Raises FileNotFoundError if there is none, and ValueError, naming it, if it is corrupt or
        truncated, of a newer format, or belongs to another model or tokenizer.
        """
        about, moments, names = files.read(Path(path), model, tokenizer.fingerprint)
        session = Session(model, tokenizer, keep=about.keep, folder=about.folder)
        session.created = about.created
        session.marks = dict(zip(names, moments[1:], strict=True))
        session._adopt(moments[0])
        return session

    @staticmethod
    def saved(folder: str | Path) -> "list[tuple[Path, files.SessionHeader | ValueError]]":
        """The headers of the sessions in a folder, by name; for a broken file, what is wrong with
        it.

        Raises FileNotFoundError if it is not a folder.
        """
        return files.find(folder)

    def _take(self, ids: NDArray[np.int64], losses: NDArray[np.float32], state: LMState) -> None:
        """Advance to a state that has read these tokens, adding them to the open episode."""
        episodes = self.now.episodes
        if self._open:
            episodes = (*episodes[:-1], episodes[-1].grown(ids, losses, self.keep))
        self.now = replace(self.now, state=state, episodes=episodes)

    def _closed(self, what: str) -> None:
        if self._open:
            raise ValueError(f"episode {self.now.episodes[-1].name!r} is open: end it before {what}")

    def _marked(self, name: str) -> Moment:
        if name not in self.marks:
            known = f"its marks are {', '.join(self.marks)}" if self.marks else "it has no marks yet"
            raise ValueError(f"the session has no mark {name!r}; {known}")
        return self.marks[name]

    def _adopt(self, moment: Moment) -> None:
        """Restore a moment, including its weights."""
        if moment.delta is not self.now.delta:
            self.model = learned(self.base, moment.delta)
        self.now = moment
