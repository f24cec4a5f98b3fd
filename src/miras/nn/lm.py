"""The language model: embedding, residual blocks, norm, head. One call for training, prefill and
decoding."""

import os
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from miras.core.observe import watching
from miras.core.state import Record, misfit
from miras.engine import graphable
from miras.engine.plan import Plan, plan
from miras.nn.config import ModelConfig
from miras.nn.norm import RMSNorm


@dataclass(frozen=True)
class LMState(Record):
    """Everything a stream needs to continue: each layer's state, and the number of tokens read,
    (B,) int64.

    place: on the host, (B,) int64, tokens read of the open document; None if only the layers know.
    """

    layers: tuple[Any, ...]
    tokens: Tensor
    place: Tensor | None = field(default=None, kw_only=True)

    def to(self, device: torch.device | str) -> Self:
        return replace(super().to(device), place=self.place)

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        plain = self if "place" in tensors else replace(self, place=None)
        return super(LMState, plain).with_tensors(tensors)

    def __repr__(self) -> str:
        rows = len(self.tokens)
        read = "" if self.tokens.is_meta else f", {_counts(self.tokens.tolist())} tokens read"
        return (
            f"{type(self).__name__}({rows} row{'s' * (rows != 1)}{read}, {len(self.layers)} layers, "
            f"{self.nbytes():,} bytes on {self.tokens.device})"
        )


def _counts(tokens: list[int]) -> str:
    """Token counts of a few rows, or their range."""
    if len(set(tokens)) == 1:
        return f"{tokens[0]:,}"
    return f"{min(tokens):,} to {max(tokens):,}" if tokens else "no"


class Block(nn.Module):
    """A residual block: x += mixer(norm(x)); x += mlp(norm(x)), the second only if the config has
    an MLP."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = config.mixer(number).build(config)
        self.mlp = None
        if config.mlp is not None:
            self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.mlp = config.mlp.build(config)
        self.name = f"layers.{number}"

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.nn.Module.compile`, with the memory inside the graph; fullgraph=True forbids graph
        breaks."""
        graphable()
        super().compile(*args, **kwargs)

    def forward(self, x: Tensor, state: Any, plan: Plan) -> tuple[Tensor, Any]:
        # The state of a new stream is made here, where the block's parameters are available even if
        # sharded.
        if state is None:
            state = self.mixer.initial(len(x), x)
        else:
            self.mixer.fits(state, len(x))
        y, state = self.mixer.mix(self.mixer_norm(x), state, plan.watched(self.name))
        x = x + y
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x)), state

    def outputs(self) -> list[Tensor]:
        """The weights of the linear maps that write to the residual stream."""
        return [*self.mixer.outputs(), *([] if self.mlp is None else [self.mlp.get_parameter("down.weight")])]


class Reader(nn.Module):
    """Tokens to hidden states, by an embedding, residual blocks and a final norm, which a subclass
    makes."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: RMSNorm

    def initial(self, rows: int) -> LMState:
        """The state before the first token of `rows` streams."""
        like = self.embed_tokens.weight
        layers = tuple(block.mixer.initial(rows, like[:0]) for block in self.layers)  # pyright: ignore
        none = torch.zeros(rows, dtype=torch.long)
        return LMState(layers, none.to(like.device), place=none)

    def read(
        self,
        tokens: Tensor,
        state: LMState | None = None,
        *,
        valid: Tensor | None = None,
        write: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, LMState]:
        """tokens (B, T) int64, or their embeddings (B, T, hidden) -> normalised hidden states (B,
        T, hidden), state.

        Raises ValueError for other tokens, for ids outside the vocabulary (on a CPU, ignoring
        padding), and for a state with other rows or layers.
        """
        self.check(tokens, state)
        B, T = tokens.shape[:2]
        new = torch.zeros(B, dtype=torch.long, device=tokens.device)
        given, state = state, LMState((None,) * len(self.layers), new) if state is None else state
        try:
            place = [0] * B if given is None else self.place(given)
            made = plan((B, T), place, tokens.device, valid, write, reset, watching("memory"))
            for block in self.layers:
                block.mixer.prepare(made)  # pyright: ignore
            x, layers = self.run(made.gather(tokens), state.layers, made)
        except (AttributeError, RuntimeError, ValueError) as error:
            if given is not None and (reason := self.misfit(given)):
                raise ValueError(
                    f"LM: the state belongs to another model: {reason}; pass a state that this model returned"
                ) from error
            raise
        moved = T if made.length is None else made.length
        place = torch.tensor(made.after(), dtype=torch.long, device="cpu")
        return made.scatter(x), LMState(layers, state.tokens + moved, place=place)

    def misfit(self, state: LMState) -> str | None:
        """How a state differs in structure from those of this model, or None."""
        here = self.initial(len(state.tokens))
        return misfit({"layers": state.layers}, {"layers": here.layers})

    def check(self, tokens: Tensor, state: LMState | None) -> None:
        """Raise ValueError as `read` does."""
        if not isinstance(tokens, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"LM: tokens must be a tensor (B, T) int64, got a {type(tokens).__name__}; for one stream of "
                f"ids write torch.tensor([ids]), and a tokenizer makes ids of text"
            )
        embedded = tokens.dim() == 3 and tokens.is_floating_point()
        if embedded and tokens.shape[-1] != (hidden := self.embed_tokens.embedding_dim):
            raise ValueError(f"LM: embeddings must be (B, T, {hidden}), got {tuple(tokens.shape)}")
        if not embedded and (tokens.dim() != 2 or tokens.dtype != torch.long):
            way = "; for one stream write tokens[None]" if tokens.dim() == 1 else ""
            way += "" if tokens.dtype == torch.long else "; ids are whole numbers: tokens.long()"
            raise ValueError(
                f"LM: tokens must be (B, T) int64, got {tokens.dtype} {tuple(tokens.shape)}{way}"
            )
        if state is None:
            return
        if not isinstance(state, LMState):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"LM: the state must be an LMState, got a {type(state).__name__}; a call returns "
                f"(logits, state): pass the second"
            )
        if len(state.layers) != len(self.layers):
            raise ValueError(
                f"LM: the state belongs to another model: it has {len(state.layers)} layers, this one "
                f"{len(self.layers)}"
            )
        if state.tokens.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"LM: the state has {state.tokens.shape[0]} rows and the tokens {tokens.shape[0]}; a state continues "
                f"the rows that it was made with (state.select picks or repeats rows)"
            )

    def place(self, state: LMState) -> list[int]:
        """The number of tokens each row has read of its open document, or of the longest unit that
        a layer counts."""
        if state.place is not None:
            return state.place.tolist()
        blocks = zip(self.layers, state.layers, strict=True)
        found = [block.mixer.place(part) for block, part in blocks]  # pyright: ignore
        return [max(row) for row in zip(*filter(None, found), strict=True)] or [0] * len(state.tokens)

    def run(self, tokens: Tensor, layers: tuple[Any, ...], plan: Plan) -> tuple[Tensor, tuple[Any, ...]]:
        """`read` with tokens in the plan's order and the states of layers; no host
        synchronisation."""
        x = tokens if tokens.dim() == 3 else self._embedded(tokens)
        after: list[Any] = []
        for block, part in zip(self.layers, layers, strict=True):
            x, part = block(x, part, plan)
            after.append(part)
        return self.norm(x), tuple(after)

    def one_graph(self, plan: Plan) -> bool:
        """Whether a call of one token begins no segment and ends no chunk in any layer."""
        return all(block.mixer.one_graph(plan) for block in self.layers)  # pyright: ignore

    def _embedded(self, ids: Tensor) -> Tensor:
        try:  # on a CPU the embedding checks anyway
            return self.embed_tokens(ids)
        except IndexError as error:
            size = self.embed_tokens.num_embeddings
            wrong = ids[(ids < 0) | (ids >= size)]
            raise ValueError(
                f"LM: token id {int(wrong[0])} is outside the model's vocabulary, 0 to {size - 1}; were these tokens "
                f"made with the model's own tokenizer?"
            ) from error


class Stack(Reader):
    """Embedding, residual blocks and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        # Residual branches add up; this scale gives their sum over depth the variance of one
        # branch.
        with torch.no_grad():
            for block in self.layers:
                for weight in block.outputs():  # pyright: ignore
                    weight /= (2 * config.num_hidden_layers) ** 0.5

    forward = Reader.read


class LM(nn.Module):
    """A causal language model with memories that learn while it reads: (tokens, state) -> (logits,
    state)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            way = f"miras.preset({config!r})" if isinstance(config, str) else "miras.preset(NAME)"
            raise ValueError(
                f"LM: config must be a ModelConfig, as {way} gives it, got a {type(config).__name__}"
            )
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=config.hidden_size**-0.5)

    def initial(self, rows: int) -> LMState:
        """The state before the first token of `rows` streams."""
        return self.model.initial(rows)

    def forward(
        self,
        tokens: Tensor,
        state: LMState | None = None,
        *,
        valid: Tensor | None = None,
        write: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, LMState]:
        """tokens (B, T) int64 -> logits (B, T, vocab) for the next token, and the state afterwards.

        `state=None` starts new streams; a call with the returned state continues them, wherever
        they were cut. valid, write, reset (B, T) bool: a token outside `valid` changes nothing (its
        logits are 0); one outside `write` reads the memories without writing to them; `reset` marks
        the first token of a document.
        """
        x, state = self.hidden(tokens, state, valid=valid, write=write, reset=reset)
        return self.lm_head(x), state

    def hidden(
        self,
        tokens: Tensor,
        state: LMState | None = None,
        *,
        valid: Tensor | None = None,
        write: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, LMState]:
        """Like a call, but returns the normalised hidden states (B, T, hidden) instead of
        logits."""
        return self.model(tokens, state, valid=valid, write=write, reset=reset)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile every residual block by itself: blocks of one kind share a graph, and only its
        first call is slow."""
        for block in self.model.layers:
            block.compile(*args, **kwargs)

    def one_token(
        self, tokens: Tensor, layers: tuple[Any, ...], place: int
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """A call for one token of each row, (B, 1), without gradients.

        `Compiled` compiles this: `place` represents all positions at which no segment begins and no
        chunk ends.
        """
        B = len(tokens)
        x, layers = self.model.run(tokens, layers, Plan(tokens.device, 1, (place,) * B, (1,) * B, ((),) * B))
        return self.lm_head(x), layers

    def num_parameters(self) -> int:
        """Number of learned parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def state_bytes(self) -> int:
        """Bytes of one stream's state before its first token (with full attention it grows from
        there)."""
        return self.initial(1).nbytes()

    def flops_per_token(self) -> int:
        """FLOPs of one token's forward pass, two per multiply-add; full attention is counted
        without its cache."""
        return self.config.flops_per_token()


def instead_of(model: Any) -> str:
    """How to get an LM from what was given instead: the end of an error message."""
    if isinstance(model, str | os.PathLike):
        return f"; load the folder first: miras.load_model({str(model)!r})"
    of_transformers = isinstance(getattr(model, "model", None), Reader)
    return "; model.lm() is that of a transformers model" if of_transformers else ""
