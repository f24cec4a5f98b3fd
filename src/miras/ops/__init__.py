"""Faster ways to the numbers of core, chosen in one place."""

from torch import Tensor

from miras.core.rule import Masks, Rule, State
from miras.core.scan import scan as chunkwise
from miras.core.state import Tree
from miras.ops import exact, mlp
from miras.ops.decode import compiles, decode, decodes
from miras.ops.exact import blockwise


def scan(
    rule: Rule,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tree,
    *,
    valid: Tensor | None = None,
    write: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Tree | None = None,
    outer: Tree | None = None,
) -> tuple[Tensor, State]:
    """Any number of tokens through a memory: arguments and numbers of `miras.recurrence`, on its fastest way."""
    masks = Masks(valid, write, reset)
    if decodes(rule, q, masks):
        return decode(rule, state, q, k, v, gates, initial=initial, outer=outer)
    run = blockwise if exact.fits(rule, gates) else mlp.chunkwise if mlp.fits(rule, gates) else chunkwise
    return run(rule, state, q, k, v, gates, **masks._asdict(), initial=initial, outer=outer)


__all__ = ["compiles", "decode", "scan"]
