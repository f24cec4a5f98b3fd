"""Root mean square norm that takes the type of its input, as autocast needs."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis, in x's type."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)  # pyright: ignore[reportUnnecessaryComparison]
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)
