"""The models: the layers of `miras.LM` with the interface of `transformers`. B rows, T tokens."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils.generic import can_return_tuple

from miras.hf.cache import MirasCache, Turn
from miras.hf.config import MirasConfig, trusting
from miras.nn.gates import Precise
from miras.nn.lm import LM, Reader, Stack


@contextmanager
def _full_precision() -> Generator[torch.dtype, None, None]:
    """Make modules in fp32 inside the `with` block, and yield the requested dtype."""
    asked = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield asked
    finally:
        torch.set_default_dtype(asked)


class MirasPreTrainedModel(PreTrainedModel):
    """Shared by the models: construction, loading and saving."""

    config_class = MirasConfig
    config: MirasConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[Any] = ["Block"]
    _skip_keys_device_placement: ClassVar[Any] = ["past_key_values"]
    _is_stateful = True
    supports_gradient_checkpointing = False

    @classmethod
    def from_pretrained(cls, *args: Any, trust_remote_code: bool | None = None, **kwargs: Any) -> Any:
        """As in `transformers`; `trust_remote_code` allows the config to name code to import and
        run."""
        token = trusting.set(bool(trust_remote_code))
        try:
            return super().from_pretrained(*args, **kwargs)
        finally:
            trusting.reset(token)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: every saved config names its classes, and their source stays in the
        package."""

    def post_init(self) -> None:
        """Mark which parameters are initialised: all but those on the meta device."""
        for x in [*self.parameters(), *self.buffers()]:
            x._is_hf_initialized = not x.is_meta
        super().post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise what neither the constructor nor a checkpoint has filled."""
        for module in self.modules():
            if isinstance(module, Precise):
                module.reset_fixed()
        empty = [n for n, p in self.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
        if empty:
            with torch.device("cpu"):
                new = type(self)(self.config)
            for name in empty:
                self.get_parameter(name).copy_(new.get_parameter(name))

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what `transformers` adds to a model, such as embeddings of new tokens."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refused: memory layers already recompute."""
        raise ValueError(
            f"{type(self).__name__} has no gradient checkpointing to enable: memory layers already recompute groups "
            f"of chunks in the backward pass; omit activation_checkpointing"
        )


class MirasModel(MirasPreTrainedModel, Reader):
    """Embedding, residual blocks and the final norm: tokens to hidden states."""

    def __init__(self, config: MirasConfig) -> None:
        super().__init__(config)
        with _full_precision() as dtype:
            stack = Stack(config.model_config())
        for name, part in stack.to(dtype).named_children():
            self.add_module(name, part)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        write: Tensor | None = None,
        reset: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T), or inputs_embeds (B, T, hidden), read after what `past_key_values` has
        read.

        attention_mask (B, past + T): 0 for padding, which changes nothing. write, reset (B, T)
        bool: a token outside `write` is read without learning; `reset` marks the first token of a
        document. Raises ValueError for other inputs, such as position_ids.
        """
        _refuse(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = MirasCache() if past_key_values is None and use_cache else past_key_values
        if cache is not None and not isinstance(cache, MirasCache):
            raise ValueError(f"past_key_values must be a MirasCache, got a {type(cache).__name__}")
        state = None if cache is None else cache.open(input_ids)
        state = None if state is None else state.to(x.device)
        valid = _valid(attention_mask, x)
        hidden, state = self.read(x, state, valid=valid, write=write, reset=reset)
        if cache is not None:
            cache.advance(state, input_ids, x.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for inputs that would be silently ignored."""
    for name, instead in (
        (
            "position_ids",
            "the model counts positions itself; mark the documents of a packed batch with reset",
        ),
        ("cu_seq_lens_q", "mark the documents of a packed batch with reset"),
        ("output_attentions", "there are no attention maps; miras.observe() shows what memories do"),
        ("output_hidden_states", "only the last hidden states are returned"),
    ):
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported: {instead}")


def _valid(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask of the tokens x (B, T, ...) from an attention mask (B, past + T)."""
    if mask is None:
        return None
    if mask.dim() != 2 or len(mask) != len(x) or mask.shape[1] < x.shape[1]:
        raise ValueError(
            f"attention_mask must be (rows, past + new tokens), here ({len(x)}, at least {x.shape[1]}), got "
            f"{tuple(mask.shape)}"
        )
    return mask[:, mask.shape[1] - x.shape[1] :].to(x.device, torch.bool)


class MirasForCausalLM(MirasPreTrainedModel, GenerationMixin):
    """A `miras.LM` as a causal language model of `transformers`."""

    _tied_weights_keys: ClassVar[Any] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MirasConfig) -> None:
        super().__init__(config)
        self.model = MirasModel(config)
        self.lm_head = _head(config, config.vocab_size)
        self.post_init()

    @classmethod
    def of(cls, model: LM, **kwargs: Any) -> Self:
        """The same model here, with the same parameters, not copies; `kwargs` as `MirasConfig.of`
        takes them."""
        with torch.device("meta"):
            made = cls(MirasConfig.of(model.config, **kwargs))
        return _sharing(made, model)

    def lm(self) -> LM:
        """The same model as a `miras.LM`, with the same parameters, not copies: for sessions,
        streams and reports."""
        with torch.device("meta"):
            made = LM(self.config.model_config())
        return _sharing(made, self)

    def projections(self) -> list[str]:
        """Names of the query, key, value and output projections of each mixer, for LoRA."""
        return [
            name
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear) and ".mixer." in name and not name.endswith("gates.proj")
            if name.rpartition(".")[2] in ("q", "k", "v", "out", "proj")
        ]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        write: Tensor | None = None,
        reset: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `MirasModel`; labels (B, T) are the input ids, -100 where a token is not scored.

        Predictions from padding are not scored. `logits_to_keep`: only the last so many logits, 0
        for all.
        """
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            write=write,
            reset=reset,
            **kwargs,
        )
        hidden = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            valid = _valid(attention_mask, hidden)
            if valid is not None:
                before = torch.cat([torch.ones_like(valid[:, :1]), valid[:, :-1]], 1)
                labels = labels.masked_fill(~before, -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`; a `MirasCache` of an earlier turn is continued.

        The prompt is then the whole text so far, or the output of `MirasCache.begin_turn` for new
        tokens only. Raises ValueError for any other prompt, which would drop tokens.
        """
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        given = kwargs.get("past_key_values")
        if isinstance(given, MirasCache):
            given.check_prompt(prompt)
        out = super().generate(inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        cache = getattr(out, "past_key_values", given)
        if isinstance(cache, MirasCache):
            made = getattr(out, "sequences", out)[:, 0 if prompt is None else prompt.shape[1] :]
            cache.end_turn(made)
        return out

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Put a MirasCache where `generate` expects one, with a row for every sequence."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not supported: the models' "
                f"state already has a constant size; omit it"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache:
            cache = model_kwargs["past_key_values"] = MirasCache()
        if isinstance(cache, MirasCache):
            beams = generation_config.num_beams
            copies = max(beams, generation_config.num_return_sequences)
            cache.prepare(Turn(copies, beams > 1, generation_config._eos_token_tensor), batch_size)


M = TypeVar("M", bound=nn.Module)


def _sharing(made: M, source: nn.Module) -> M:
    """`made`, with the parameters and buffers of a module that has the same names."""
    made.load_state_dict(source.state_dict(keep_vars=True), assign=True)
    for name, x in source.named_buffers():
        owner, _, last = name.rpartition(".")
        made.get_submodule(owner).register_buffer(last, x, persistent=False)
    return made.train(source.training)


def _head(config: MirasConfig, size: int) -> nn.Linear:
    """A linear map from the hidden states to `size` logits."""
    with _full_precision() as dtype:
        head = nn.Linear(config.hidden_size, size, bias=False)
        if not (size == config.vocab_size and config.tie_word_embeddings):
            nn.init.normal_(head.weight, std=config.hidden_size**-0.5)
    return head.to(dtype)


class MirasForSequenceClassification(MirasPreTrainedModel):
    """A linear classifier on the hidden state of each row's last token."""

    def __init__(self, config: MirasConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MirasModel(config)
        self.score = _head(config, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """As `MirasModel`; logits (B, labels). Without a mask, ids equal to `config.pad_token_id`
        are padding."""
        pad = self.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            attention_mask = (input_ids != pad).long()
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = out.last_hidden_state
        valid = _valid(attention_mask, hidden)
        if valid is None:
            last = torch.full_like(hidden[:, 0, 0], hidden.shape[1] - 1, dtype=torch.long)
        else:
            last = (valid * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)).argmax(1)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, logits=logits, config=self.config, **kwargs
            )
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)
