"""The options of `miras train`. This module does not import torch, so --help is fast."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Fixed, Positional, Suppress


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Settings that may differ from a preset or a model folder."""

    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    chunk_size: int | None = None
    """Tokens whose gradients are taken at the same weights of the memory."""
    window_size: int | None = None
    """Tokens in the attention window."""
    segment_size: int | None = None
    """Tokens of a segment of memory as context (mac), a multiple of chunk_size."""
    pool: int | None = None
    """Tokens of a segment that share one memory token (mac)."""
    num_persistent: int | None = None
    key_dim: int | None = None
    """Width of a memory's keys per head; by default that of the head."""
    value_dim: int | None = None
    """Width of a memory's values per head; by default that of the head."""
    pattern: tuple[str, ...] | None = None
    """Mixers of the layers, repeated: attention, memory, mac, mag, mal."""
    tie_word_embeddings: bool | None = None
    conv_size: int | None = None
    """Taps of the convolutions after a memory's projections, 0 for none."""
    initial_scale: float | None = None
    """Standard deviation of the initial memory, times the square root of its input width."""
    rule: Annotated[dict[str, str], Suppress, Fixed] = field(default_factory=dict[str, str])
    """Choices of the memory's rule, and their fields, as `miras.train.choices` reads them from
    flags and files."""

    def sizes(self) -> dict[str, Any]:
        """The sizes that were given."""
        values = {f.name: getattr(self, f.name) for f in fields(ModelOptions) if f.name != "rule"}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the optimizer."""

    steps: int
    """Optimizer steps."""
    lr: float = 3e-3
    """Peak learning rate."""
    own_lr: float = 1.0
    """Learning rate of gates, norms and initial memories, as a multiple of lr."""
    min_lr: float = 0.1
    """Learning rate at the end, as a multiple of lr."""
    warmup: int = 50
    """Steps of linear warm-up before the cosine."""
    weight_decay: float = 0.1
    """Weight decay of matrices; gates, norms and initial memories have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Largest norm of the gradient."""
    write_price: float = 0.0
    """Penalty on writing: this times the mean opening of the lr and forget gates is added to the
    loss."""
    bf16: bool = False
    """bf16 autocast; memories stay in fp32."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Settings, ModelOptions):
    """Train a model on text (or on needles) and write checkpoints, metrics and the model to a
    folder."""

    out: Path
    """Folder for checkpoints, metrics.jsonl and the trained model."""
    text: tuple[str, ...] = ()
    """Text to train on: files, .xz .gz .bz2, .zip and tar archives, folders or globs. By default
    the embedded novel."""
    needle: bool = False
    """Train on finding needles in filler instead of text."""
    preset: str = "titans-mag"
    """The model; `miras info` describes each."""
    model: Path | None = None
    """Start from this model folder instead of a fresh preset."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
    tokenizer: Path | None = None
    """A `tokenizers` JSON file; by default tokens are bytes."""
    cache: Path | None = None
    """Folder for tokenised text; by default OUT/tokens."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 4
    """Lanes of text read side by side."""
    seq_len: int = 512
    """Tokens of each lane per step, through which gradients flow."""
    accumulate: int = 1
    """Micro-batches per optimizer step, each with its own lanes."""
    carry: bool = True
    """Carry each lane's state from one step to the next (truncated backpropagation through time). A
    model with full attention starts each step with a new state, because its state would grow with
    every token."""
    write_price_from: float = 0.3
    """Running accuracy (with --needle) from which the penalty applies; for text it always
    applies."""
    seed: int = 0
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints to keep."""
    resume: bool = False
    """Continue exactly from the newest checkpoint in OUT; options not given are those the run was
    started with."""


CHECK_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "window_size": 64,
    "segment_size": 64,
    "num_persistent": 4,
}
"""Sizes of a preset in `miras check-training`: small enough for half a minute, large enough to show
problems."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ModelOptions):
    """Train a preset for a few steps and check whether it learns: loss, gradients, weights,
    sensitivity.

    The exit status is 0 if everything is in range, 1 if not.
    """

    model: Positional[str]
    """A preset's name, or a model folder whose config is trained from scratch."""
    steps: int = 60
    """Optimizer steps; the first ten are not judged."""
    lr: float = 3e-3
    """Peak learning rate."""
    own_lr: float = 1.0
    """Learning rate of gates, norms and initial memories, as a multiple of lr."""
    batch_size: int = 4
    """Lanes of text read side by side; their states are carried from step to step."""
    seq_len: int = 256
    """Tokens of each lane per step."""
    seed: int = 0
    text: tuple[str, ...] = ()
    """Text to train on: files, .xz .gz .bz2, .zip and tar archives, folders or globs. By default
    the embedded novel."""
    reference: bool = True
    """Also train Gated DeltaNet of equal size on the same bytes."""
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
    json: Path | None = None
    """File to write the results to."""
