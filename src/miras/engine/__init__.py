"""Every faster way to the numbers of `recurrence`, chosen in one place."""

from functools import partial

from torch import Tensor

from miras.core.rule import Masks, Rule, State
from miras.core.state import Tree, ordinary
from miras.engine import channels, exact, mlp
from miras.engine.chunks import dual, scan_by
from miras.engine.chunks import scan as chunkwise
from miras.engine.decode import compiles, decode, decodes
from miras.engine.exact import blockwise


@ordinary
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
    if mlp.fits(rule, gates):
        run = partial(dual, factors=mlp.factors)
        return scan_by(run, rule, state, (q, k, v, gates), masks, initial, outer)
    if channels.fits(rule, gates) and not exact.fits(rule, gates):
        return scan_by(channels.run, rule, state, (q, k, v, gates), masks, initial, outer)
    run = blockwise if exact.fits(rule, gates) else chunkwise
    return run(rule, state, q, k, v, gates, **masks._asdict(), initial=initial, outer=outer)


__all__ = ["compiles", "decode", "scan"]
