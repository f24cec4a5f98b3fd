"""Writes the folders, states and session of `tests/golden/v1`, and the numbers that they gave.

They were written once, by the version before retentions could decay towards the initial memory; what a file leaves
out means what it meant then. Run from the repository's root, with the version that the files are to be written by:

    python tests/golden/make.py tests/golden/v1
"""

import json
import sys
from pathlib import Path

import torch

import miras
from miras.data.tokens import ByteTokenizer
from miras.nn.folder import model_hash, save_model
from miras.stream.files import save_state

PRESETS = (
    "titans-lmm",
    "titans-mac",
    "titans-mag",
    "titans-linear",
    "ttt-mlp",
    "moneta",
    "yaad",
    "memora",
    "gated-deltanet",
    "mamba2",
    "transformer",
)


def config(name: str) -> miras.ModelConfig:
    """A preset at the smallest size; "composed" leaves out all that a config can leave out."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "intermediate_size": 8,
    }
    if name == "composed":
        return miras.zoo.override(
            miras.ModelConfig(), rule=miras.Rule(miras.MLP(), miras.Huber(), chunk_size=4), **sizes
        )
    wired = {"num_persistent": 2} if name in ("titans-mac", "titans-mag") else {}
    wired |= {"segment_size": 32} if name == "titans-mac" else {"window_size": 16} if wired else {}
    return miras.preset(name, **sizes, **wired)


def main(out: Path) -> None:
    """Write a folder, a state at token 37, and the logits of tokens 37 to 60 for every model."""
    tokens = torch.arange(61).mul(7).remainder(31)[None]
    told = {}
    for number, name in enumerate((*PRESETS, "composed")):
        torch.manual_seed(number)
        model = miras.LM(config(name)).double()
        for p in model.parameters():
            p.data.copy_(p.data.float())
        with torch.no_grad():
            _, state = model(tokens[:, :37])
            logits, _ = model(tokens[:, 37:], state)
        model.float()
        save_model(model, out / name)
        with torch.no_grad():
            _, kept = model(tokens[:, :37])
        save_state(out / f"{name}.state", kept, model)
        told[name] = {"hash": model_hash(model), "logits": logits[0, -1].tolist()}
    torch.manual_seed(99)
    talker = miras.LM(
        miras.preset(
            "titans-mag",
            hidden_size=8,
            num_hidden_layers=1,
            num_heads=2,
            window_size=16,
            num_persistent=2,
            intermediate_size=8,
        )
    )
    save_model(talker, out / "talker")
    session = miras.Session(talker, ByteTokenizer())
    session.feed("The memory reads on. ")
    session.save(out / "talker.session")
    session.feed("And goes on.")
    told["talker"] = {"hash": model_hash(talker), "loss": session.feed("The memory reads on.").loss}
    (out / "told.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
