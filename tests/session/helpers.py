"""What the tests of sessions share."""

import numpy as np
import torch

from miras.nn.lm import LMState
from miras.session.session import Session


def equal(a: LMState, b: LMState) -> bool:
    """Whether two states are the same to the bit."""
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def logits(session: Session, text: bytes) -> torch.Tensor:
    """What a session would say at each byte of a text, which it does not read."""
    ids = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))[None]
    with torch.no_grad():
        return session.model(ids, session.now.state)[0]
