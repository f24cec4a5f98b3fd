"""Training in two processes is training in one: DistributedDataParallel around a model whose states are carried."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from miras.nn.lm import LM
from miras.zoo import preset

STEPS, LENGTH = 3, 6


def small() -> LM:
    torch.manual_seed(0)
    return LM(preset("ttt-mlp", vocab_size=11, hidden_size=8, num_hidden_layers=1, num_heads=2)).double()


def tokens() -> Tensor:
    return torch.randint(11, (4, STEPS * LENGTH + 1), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, tokens: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = None
    for at in range(0, STEPS * LENGTH, LENGTH):
        logits, state = model(tokens[:, at : at + LENGTH], state)
        target = tokens[:, at + 1 : at + LENGTH + 1]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
        state = state.detach()


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = small()
    # From the second step on a carried state stands in for the initial memory, which then has no gradient.
    train(nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), tokens()[rank::2])
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch was built without gloo")
def test_two_processes_are_one(tmp_path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    one = small()
    train(one, tokens())
    assert (one.model.layers[0].mixer.reader.A0.w1 - small().model.layers[0].mixer.reader.A0.w1).any()
    for rank in range(2):
        torch.testing.assert_close(
            torch.load(tmp_path / f"{rank}.pt"), one.state_dict(), rtol=0, atol=1e-12, msg=str(rank)
        )


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
