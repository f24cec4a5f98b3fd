"""The options of `miras train`. This module does not import torch, so --help is fast."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Fixed, Positional, Suppress


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What may differ from a preset or from a model folder."""

    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    chunk_size: int | None = None
    """Tokens that share one gradient point of the memory."""
    window_size: int | None = None
    """Tokens that sliding-window attention sees."""
    segment_size: int | None = None
    """Tokens of a segment of memory as context (mac), a multiple of chunk_size."""
    pool: int | None = None
    """Tokens of a segment that share one memory token (mac)."""
    num_persistent: int | None = None
    key_dim: int | None = None
    """Width of a memory's keys in each head; that of the head without it."""
    value_dim: int | None = None
    """Width of a memory's values in each head; that of the head without it."""
    pattern: tuple[str, ...] | None = None
    """Mixers of the layers, repeated: attention, memory, mac, mag, mal."""
    tie_word_embeddings: bool | None = None
    conv_size: int | None = None
    """Taps of the convolutions behind a memory's projections, 0 for none."""
    initial_scale: float | None = None
    """Deviation of the initial memory, times the square root of its input width."""
    rule: Annotated[dict[str, str], Suppress, Fixed] = field(default_factory=dict[str, str])
    """Choices of the memory's rule, and their fields, as `miras.train.choices` reads them from
    flags and files."""

    def sizes(self) -> dict[str, Any]:
        """The sizes that are given."""
        values = {f.name: getattr(self, f.name) for f in fields(ModelOptions) if f.name != "rule"}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the optimizer steps."""

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
    """Price on writing: times the mean open share of lr and forget gates, added to the loss."""
    bf16: bool = False
    """bf16 autocast; memories stay in fp32."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Settings, ModelOptions):
    """Train a model on text (or on needles) and write checkpoints, metrics and the model to a
    folder."""

    out: Path
    """Folder for checkpoints, metrics.jsonl and the trained model."""
    text: tuple[str, ...] = ()
    """Text to learn: files, .xz .gz .bz2, .zip and tar archives, folders or globs. Without it, the
    embedded novel."""
    needle: bool = False
    """Learn to find needles in noise instead of learning text."""
    preset: str = "titans-mag"
    """The model; `miras info` shows what each one is."""
    model: Path | None = None
    """Start from this model folder instead of a fresh preset."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
    tokenizer: Path | None = None
    """A `tokenizers` JSON file; bytes without it."""
    cache: Path | None = None
    """Folder for tokenised text; OUT/tokens without it."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 4
    """Lanes of text read side by side."""
    seq_len: int = 512
    """Tokens of a lane in one step; gradients flow through that many."""
    accumulate: int = 1
    """Micro-batches per optimizer step, each with its own lanes."""
    carry: bool = True
    """Carry each lane's state from one step to the next (truncated backpropagation through time). A
    model whose attention has no window begins anew in each step, because its state would grow with
    every token."""
    write_price_from: float = 0.3
    """Running accuracy (needles) from which the price is asked; text asks it from the start."""
    seed: int = 0
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints to keep."""
    resume: bool = False
    """Go on from the newest checkpoint in OUT, as if there had been no stop; options left out are
    as it began."""


CHECK_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "window_size": 64,
    "segment_size": 64,
    "num_persistent": 4,
}
"""What `miras check-training` makes of a preset: small enough for half a minute, large enough to go
wrong."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ModelOptions):
    """Train a preset for a few steps and say whether it learns: loss, gradients, weights,
    sensitivity.

    The exit status is 0 when everything is in range, 1 when something is not.
    """

    model: Positional[str]
    """A preset's name, or a model folder, whose config is trained from the beginning."""
    steps: int = 60
    """Optimizer steps, the first ten of which are not judged."""
    lr: float = 3e-3
    """Peak learning rate."""
    own_lr: float = 1.0
    """Learning rate of gates, norms and initial memories, as a multiple of lr."""
    batch_size: int = 4
    """Lanes of text read side by side; their states are carried from step to step."""
    seq_len: int = 256
    """Tokens of a lane in one step."""
    seed: int = 0
    text: tuple[str, ...] = ()
    """Text to train on: files, .xz .gz .bz2, .zip and tar archives, folders or globs. Without it, a
    novel."""
    reference: bool = True
    """Also train Gated DeltaNet of equal size on the same bytes."""
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
    json: Path | None = None
    """File to write all of it to."""
