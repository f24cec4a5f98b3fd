"""Whether a model learns: a short training run that checks for the usual problems of memories."""

import copy
import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from miras.core.algorithm import GradientDescent
from miras.core.observe import observe
from miras.core.rule import init_state
from miras.data.novel import load_novel
from miras.engine import scan
from miras.nn.config import ModelConfig
from miras.nn.gates import LINKS
from miras.nn.lm import LM
from miras.nn.memory import InitialMemory, OuterParameters
from miras.train.loop import NonFiniteError, Run
from miras.train.options import CHECK_SIZES, Settings
from miras.train.tasks import TextTask
from miras.zoo import match_size, parameters, preset

LARGEST_NORM = 100.0
"""The largest norm of the outer gradient after the first ten steps. A memory that learns has about
1."""
WEIGHT_RANGE = (0.2, 10.0)
"""|W| along a stream: at least this fraction of its initial value, at most this multiple of its
early value."""
LARGEST_STEP = 0.5
"""The median of |step| / |W| over tokens."""
NEAR = {True: 1.05, False: 1.15}
"""The largest acceptable ratio to the reference's loss: with short convolutions, and without."""
HORIZON = 2000
"""Number of tokens over which a perturbation is followed."""
CHANGE = 1e-10
"""Its size, relative to the perturbed embedding."""
CHANGED_AT = 5
WINDOW = 256
"""Number of tokens over which a change is measured."""

FOLLOWED = (
    ("A0", "initial memory"),
    ("gates", "gates"),
    ("mlp", "feed-forward"),
    ("embed_tokens", "embeddings"),
    ("lm_head", "embeddings"),
)
"""Part of a parameter's name -> group; all others are "mixers"."""


class Sensitivity(NamedTuple):
    """The growth of a perturbation of 1e-10 at token 5, in fp64.

    change: relative change of the logits (T,), the largest of all rows. state: relative change of
    the state at the end. growth: nats per 1,000 tokens, from the first `WINDOW` tokens after the
    change to the last.
    """

    change: list[float]
    state: float
    growth: float

    def reaches(self, size: float) -> int | None:
        """The first token whose logits change by `size` or more, or None."""
        return next((t for t, each in enumerate(self.change) if each >= size), None)


class Range(NamedTuple):
    """|W| of a layer along a stream: at its first token, after `WINDOW`, the extremes of its heads,
    and at the end."""

    first: float
    early: float
    smallest: float
    largest: float
    last: float


class Problem(NamedTuple):
    """A value out of range, and what to change."""

    what: str
    advice: str


@dataclass(frozen=True)
class TrainingCheck:
    """The result of `check_training`.

    loss: bits per byte of each step. reference: those of the last ten steps of Gated DeltaNet of
    equal size on the same bytes; None if not requested. norms: the norm of the outer gradient at
    each step before clipping, by group and for "all". clipped: the fraction of steps whose gradient
    was clipped. weight: |W| by layer along `HORIZON` tokens after training. step: the median of
    |step| / |W| by layer there. fresh, trained: sensitivity before and after training; None if not
    requested.
    """

    config: ModelConfig
    parameters: int
    loss: list[float]
    reference: float | None
    norms: dict[str, list[float]]
    clipped: float
    weight: dict[str, Range]
    step: dict[str, float]
    fresh: Sensitivity | None
    trained: Sensitivity | None
    failed: str | None = None
    settings: Settings = field(default_factory=lambda: Settings(steps=60))

    @property
    def last(self) -> float:
        """Mean bits per byte of the last ten steps; nan for a training that failed."""
        return math.nan if self.failed else statistics.fmean(self.loss[-10:])

    @property
    def largest_norm(self) -> float:
        """The largest norm of the outer gradient after the first ten steps; inf for a training that
        failed."""
        return math.inf if self.failed else max(self.norms["all"][10:], default=math.nan)

    def problems(self) -> list[Problem]:
        """Everything out of range, the worst first."""
        return list(_problems(self))

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        found = {
            "parameters": self.parameters,
            "settings": dataclasses.asdict(self.settings),
            "loss": self.loss,
            "last": self.last,
            "reference": self.reference,
            "norms": self.norms,
            "clipped": self.clipped,
            "weight": {layer: each._asdict() for layer, each in self.weight.items()},
            "step": self.step,
            "failed": self.failed,
            "problems": [each._asdict() for each in self.problems()],
            "config": self.config.to_dict(),
        }
        for name in ("fresh", "trained"):
            each: Sensitivity | None = getattr(self, name)
            found[name] = None if each is None else each._asdict()
        return found


def check_training(
    model: str | ModelConfig,
    *,
    steps: int = 60,
    lr: float = 3e-3,
    own_lr: float = 1.0,
    batch_size: int = 4,
    seq_len: int = 256,
    seed: int = 0,
    tokens: ArrayLike | None = None,
    reference: bool = True,
    sensitivity: bool = True,
) -> TrainingCheck:
    """Train a preset (small: `CHECK_SIZES`) or a config for a few steps with carried states, and
    report what was measured.

    tokens: ids (N,) to train on, the last `HORIZON` of which are held out to examine the memory; by
    default the embedded novel, as bytes. reference: also train Gated DeltaNet of equal size on the
    same tokens. Deterministic for a fixed number of threads. Raises ValueError for a model that
    cannot be trained or has no memory.
    """
    config = preset(model).changed(CHECK_SIZES) if isinstance(model, str) else model
    if not config.memories():
        raise ValueError("check_training: the model has no memory, only attention")
    if steps < 20:
        raise ValueError(
            f"check_training: at least 20 steps are needed, the first ten of which are not judged; got {steps}"
        )
    train, held_out = _text(config, tokens)
    settings = Settings(steps=steps, lr=lr, own_lr=own_lr, warmup=min(50, steps))
    torch.manual_seed(seed)
    lm = LM(config)
    fresh = follow_change(lm, held_out) if sensitivity else None
    run = _run(lm, train, settings, batch_size, seq_len, seed)
    loss: list[float] = []
    norms: dict[str, list[float]] = {"all": []}
    failed = None
    try:
        for row in run.until(steps):
            loss.append(row["bits_per_byte"])
            norms["all"].append(row["grad_norm"])
            unclipped = max(1.0, row["grad_norm"] / settings.clip)
            for group, norm in _norms(lm).items():
                norms.setdefault(group, []).append(norm * unclipped)
    except NonFiniteError as error:
        failed = str(error)
    weight, step = ({}, {}) if failed else _weights(lm, held_out)
    return TrainingCheck(
        config=config,
        parameters=lm.num_parameters(),
        loss=loss,
        reference=_reference(config, train, settings, batch_size, seq_len, seed) if reference else None,
        norms=norms,
        clipped=sum(norm > settings.clip for norm in norms["all"]) / max(1, len(norms["all"])),
        weight=weight,
        step=step,
        fresh=fresh,
        trained=follow_change(lm, held_out) if sensitivity and not failed else None,
        failed=failed,
        settings=settings,
    )


@torch.no_grad()
def follow_change(model: LM, tokens: Tensor, size: float = CHANGE, at: int = CHANGED_AT) -> Sensitivity:
    """Read tokens (B, T) twice in fp64, the second time with the embedding of token `at` perturbed
    by `size`."""
    twin = copy.deepcopy(model).double()
    x = twin.model.embed_tokens(tokens)
    noise = torch.randn(x[:, at].shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, at] += size * noise * x[:, at].norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    hidden, state = twin.hidden(x)
    others, other = twin.hidden(changed)
    logits = twin.lm_head(hidden)
    change = (twin.lm_head(others) - logits).norm(dim=-1) / logits.norm(dim=-1)
    change = change.amax(0)
    first, last = change[at : at + WINDOW].max(), change[-WINDOW:].max()
    floor = torch.finfo(torch.float64).eps / 16  # zero has no logarithm
    span = len(change) - WINDOW - at
    growth = float(last.clamp_min(floor).log() - first.clamp_min(floor).log()) / max(1, span) * 1000
    a, b = ([x.double() for x in _tensors(each)] for each in (state, other))
    size_of = math.sqrt(sum(float(x.square().sum()) for x in a))
    differ = math.sqrt(sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True)))
    return Sensitivity(change.tolist(), differ / size_of, growth)


def _tensors(state: Any) -> list[Tensor]:
    return [x for x in state.tensors().values() if x.is_floating_point()]


def _text(config: ModelConfig, tokens: ArrayLike | None) -> tuple[np.ndarray, Tensor]:
    """The training tokens, and (1, HORIZON) tokens to examine the memory."""
    if tokens is None:
        novel = load_novel()
        train, held_out = (np.frombuffer(x, np.uint8) for x in (novel.train, novel.heldout))
    else:
        given = np.asarray(tokens)
        if given.ndim != 1 or given.dtype.kind not in "iu" or len(given) < 10 * HORIZON:
            raise ValueError(
                f"check_training: tokens must be one row of at least {10 * HORIZON:,} ids, got {given.shape} of "
                f"{given.dtype}"
            )
        train, held_out = given[:-HORIZON], given[-HORIZON:]
    if (largest := int(train.max())) >= config.vocab_size:
        raise ValueError(
            f"check_training: token {largest} is outside the vocabulary of {config.vocab_size}; give `tokens` of its "
            f"own"
        )
    return train, torch.from_numpy(held_out[:HORIZON].astype(np.int64))[None]


def _run(lm: LM, train: Any, settings: Settings, batch_size: int, seq_len: int, seed: int) -> Run:
    carry = not lm.config.grows()
    align = lm.config.stride()
    task = TextTask(train, batch_size=batch_size, seq_len=seq_len, align=align, seed=seed, carry=carry)
    return Run(lm, task, settings)


def _reference(
    config: ModelConfig, train: Any, settings: Settings, batch_size: int, seq_len: int, seed: int
) -> float:
    """Bits per byte of Gated DeltaNet's last ten steps, of equal size on the same tokens."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "tie_word_embeddings")
    base = preset("gated-deltanet", **{name: getattr(config, name) for name in names})
    torch.manual_seed(seed)
    run = _run(LM(match_size(base, parameters(config))), train, settings, batch_size, seq_len, seed)
    return statistics.fmean(row["bits_per_byte"] for row in list(run.until(settings.steps))[-10:])


def _norms(lm: LM) -> dict[str, float]:
    """The gradient's norm by group."""
    squares: dict[str, float] = {}
    for name, p in lm.named_parameters():
        if p.grad is not None:
            parts = name.split(".")
            group = next((group for part, group in FOLLOWED if part in parts), "mixers")
            squares[group] = squares.get(group, 0.0) + float(p.grad.double().square().sum())
    return {group: math.sqrt(square) for group, square in squares.items()}


@torch.no_grad()
def _weights(lm: LM, tokens: Tensor) -> tuple[dict[str, Range], dict[str, float]]:
    """|W| and the median of |step| / |W| along tokens (1, T), by layer."""
    with observe() as seen:
        lm(tokens)
    ranges: dict[str, Range] = {}
    steps: dict[str, float] = {}
    for layer in seen.layers():
        weight = seen[layer]["weight"][0]  # (H, T)
        mean = weight.mean(0)
        ranges[layer] = Range(
            *(float(x) for x in (mean[0], mean[WINDOW], weight.min(), weight.max(), mean[-1]))
        )
        moved = seen[layer]["accumulated"][0]
        steps[layer] = float((moved / weight)[weight > 0].median())
    return ranges, steps


def _problems(check: TrainingCheck) -> Any:
    if check.failed:
        yield Problem(check.failed, "see the advice on the gradient's norm below; then lower lr")
    norm = check.largest_norm
    if not norm <= LARGEST_NORM:
        yield Problem(
            f"the outer gradient's norm reached {norm:.3g}, where a memory that learns has about 1",
            "the memory amplifies what it reads: make it forget towards its initial memory (retention "
            "towards='initial'), forget less (a lower bias of the forget gate), or remove its norm (norm=False)",
        )
    silent = [group for group, norms in check.norms.items() if max(norms, default=0.0) == 0]
    if silent:
        yield Problem(
            f"no gradient ever reached {', '.join(silent)}",
            "an initial memory of several weights must not start at 0 (initial_scale), nor a gate at a hard 0 or 1",
        )
    for layer, each in check.weight.items():
        low, high = WEIGHT_RANGE[0] * each.first, WEIGHT_RANGE[1] * each.early
        if not low <= each.smallest <= each.largest <= high:
            yield Problem(
                f"|W| of {layer} went from {each.first:.3g} to between {each.smallest:.3g} and {each.largest:.3g} in "
                f"{HORIZON:,} tokens",
                "forgetting towards 0 empties a memory, and no forgetting lets it grow: use retention "
                "towards='initial', or another initial bias of the forget gate",
            )
    for layer, share in check.step.items():
        if share > LARGEST_STEP:
            yield Problem(
                f"{layer} moves by {share:.2g} of |W| at every token (median; at most {LARGEST_STEP:g})",
                "a smaller scale of the lr gate, or a larger initial_scale",
            )
    for when, each in (("before training", check.fresh), ("after training", check.trained)):
        if each is not None and each.growth > 0:
            far = each.reaches(0.1)
            reached = f"and reaches 0.1 of the logits at token {far:,}" if far is not None else ""
            yield Problem(
                f"{when}, a change of {CHANGE:g} grows by {each.growth:.2g} nats per 1,000 tokens {reached}".strip(),
                "the stream is chaotic: forget more, towards the initial memory, take smaller steps (the lr gate's "
                "scale), or remove the memory's norm",
            )
    if check.reference is not None:
        near = NEAR[check.config.memories()[0].conv_size > 0]
        if not check.last <= near * check.reference:
            yield Problem(
                f"{check.last:.3f} bits per byte where Gated DeltaNet of equal size has {check.reference:.3f} "
                f"({check.last / check.reference:.2f} times as many, at most {near:g})",
                "another lr (3e-3 and 1e-3 are usual), or the points above",
            )


@torch.no_grad()
def written_once(
    config: ModelConfig, pairs: int = 8, *, width: int = 32, draws: int = 64, seed: int = 0
) -> float:
    """The fraction of random pairs that a config's fresh memory answers after writing each of them
    once.

    No training: keys and values are random, of length 1 and `width` channels; lr is the largest
    value of the config's gate, forget and the bias's gates have their initial values, and there is
    no momentum and no step bound. A key counts as answered if the read is closer to its own value
    than to the others. The mean of `draws` memories.
    """
    memory = config.memories()[0]
    rule, made = memory.rule, memory.made()
    lr = made["lr"].largest(1)
    if not math.isfinite(lr):
        raise ValueError("written_once: the lr gate is unbounded; give it a bounded link")
    if type(rule.algorithm) is GradientDescent:
        algorithm = dataclasses.replace(rule.algorithm, momentum=False, step_bound=0.0)
        rule = dataclasses.replace(rule, algorithm=algorithm)
    torch.manual_seed(seed)
    fresh = [InitialMemory(rule.memory.shapes(width, width), 1, memory.initial_scale) for _ in range(draws)]
    for each in fresh:
        each.reset_parameters(rule.retention)
    A_0 = {name: torch.cat([each(1)[name] for each in fresh]) for name in fresh[0](1)}
    k, v = (F.normalize(torch.randn(draws, 1, pairs, width), dim=-1) for _ in range(2))
    gates = {"lr": torch.full((draws, 1, 2 * pairs), lr)}
    for name in rule.gates():
        if name not in ("lr", "momentum"):
            gate = made[name]
            first = gate.scale * float(LINKS[gate.link](torch.tensor(gate.bias)))
            gates[name] = torch.full((draws, 1, 2 * pairs), first)
    outer = OuterParameters(rule.memory, 1, width, width)
    keys, values = (torch.cat([x, x], 2) for x in (k, v))
    write = (torch.arange(2 * pairs) < pairs).expand(draws, -1)
    y, _ = scan(
        rule, init_state(rule, A_0), keys, keys, values, gates, write=write, initial=A_0, outer=outer()
    )
    distance = torch.cdist(y[:, 0, pairs:], v[:, 0])
    return float((distance.argmin(-1) == torch.arange(pairs)).double().mean())
