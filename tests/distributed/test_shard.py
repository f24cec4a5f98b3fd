"""Training with parameters sharded over two processes is training in one: `fully_shard` of every block and the root.

Every process has half of the rows and half of each parameter. Streams go on: the second and third step read with the
state that the step before has left.
"""

import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from miras.nn.lm import LM
from miras.zoo import preset

MODELS = ("transformer", "titans-mag", "titans-mac", "gated-deltanet", "memora")
SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "window_size": 6,
    "segment_size": 4,
    "num_persistent": 2,
}
STEPS, LENGTH = 3, 6
"""The second step begins inside a chunk and a segment."""

Trained = dict[str, Tensor]


def small(name: str) -> LM:
    torch.manual_seed(0)
    config = preset(name)
    return LM(config.changed(SIZES | {"chunk_size": min(4, config.stride())})).double()


def tokens() -> Tensor:
    return torch.randint(11, (4, STEPS * LENGTH + 1), generator=torch.Generator().manual_seed(1))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(model: LM, tokens: Tensor) -> Trained:
    """Loss, gradients and state of every step, and the parameters after the last."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state, found = None, {}
    for step in range(STEPS):
        cut = tokens[:, step * LENGTH : (step + 1) * LENGTH + 1]
        logits, state = model(cut[:, :-1], state)
        optimizer.zero_grad()
        loss = F.cross_entropy(logits.flatten(0, 1), cut[:, 1:].flatten())
        loss.backward()
        state = state.detach()
        grads = {
            f"gradient of {n}": torch.zeros_like(whole(p)) if p.grad is None else whole(p.grad).clone()
            for n, p in model.named_parameters()
        }
        made = {"loss": loss.detach()} | grads | {f"state {n}": x for n, x in state.tensors().items()}
        found |= {f"step {step}: {n}": x for n, x in made.items()}
        optimizer.step()
    return found | {n: whole(p.detach()).clone() for n, p in model.named_parameters()}


def work(rank: int, folder: Path) -> None:
    """One of the two processes, for all models."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for name in MODELS:
        model = small(name)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        try:
            found[name] = train(model, tokens()[rank::2])
        except Exception:  # the same in both processes, which go on to the next model together
            found[name] = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes has found."""
    folder = tmp_path_factory.mktemp("shards")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=280)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(told)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch was built without gloo")
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(name: str, sharded: list[dict[str, Any]]) -> None:
    one = train(small(name), tokens())
    moved = small(name).state_dict()
    assert not torch.equal(one["lm_head.weight"], moved["lm_head.weight"])
    for rank, other in enumerate(sharded):
        assert isinstance(other[name], dict), other[name]
        assert other[name].keys() == one.keys()
        for n, x in other[name].items():
            if ": loss" in n:  # that of all rows is the mean of both processes'
                x = (sharded[0][name][n] + sharded[1][name][n]) / 2
            expected = one[n][rank::2] if ": state" in n else one[n]
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}")


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
