"""Finding the origin of NaN and infinity."""

import torch
from torch import Tensor, nn

from miras.core.observe import observe
from miras.nn.lm import LM, LMState


def _first_token(broken: Tensor) -> int:
    """The first token at which any of broken (..., T) is true."""
    return int(broken.flatten(0, -2).any(0).nonzero()[0])


def first_non_finite(model: LM, tokens: Tensor, state: LMState | None, **masks: Tensor) -> str:
    """A sentence that names the first layer, head and token with non-finite values in a forward
    pass."""
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            return f"parameter {name} is not finite"
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, _: object, output: Tensor | tuple[Tensor, object]) -> None:
            y = output[0] if isinstance(output, tuple) else output
            if found or not isinstance(y, Tensor) or y.dim() != 3 or y.isfinite().all():
                return
            token = _first_token(~y.isfinite().transpose(1, 2))
            found.append(f"{name} ({type(module).__name__}), token {token}")

        handles.append(module.register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        if not any(True for _ in module.children()) or isinstance(module, nn.Linear):
            watch(name, module)
    heads = {f"layers.{i}" for i in range(len(model.model.layers))}
    try:
        with torch.no_grad(), observe() as seen:
            model(tokens, state, **masks)
    finally:
        for handle in handles:
            handle.remove()
    for layer in seen.layers():
        values = seen[layer]
        broken = torch.stack([~x.isfinite() for x in values.values()]).any(0)  # (B, H, T)
        if layer in heads and broken.any():
            token = _first_token(broken)
            row, head = (int(i) for i in broken[..., token].nonzero()[0])
            kinds = [name for name, x in values.items() if not x[row, head, token].isfinite()]
            inside = f"{layer}, head {head}, token {token} (row {row}): memory {', '.join(kinds)}"
            outer = [f for f in found if f.startswith(f"model.{layer}.")]
            return inside if not outer or found[0] == outer[0] else f"{found[0]}; then {inside}"
    return found[0] if found else "no value of the forward pass: the loss itself overflowed"


def first_bad_gradient(model: nn.Module) -> str:
    """The first parameter, from the output back, whose gradient is not finite."""
    for name, p in reversed(list(model.named_parameters())):
        if p.grad is not None and not p.grad.isfinite().all():
            return f"gradient of {name}"
    return "no gradient"
