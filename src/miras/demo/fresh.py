"""A fresh process that continues from a saved memory: `python -m miras.demo.fresh FOLDER
THREADS`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from miras.nn.folder import load_model
from miras.stream.files import load_state
from miras.stream.run import read


def main(folder: Path, threads: int) -> None:
    """Print the losses of `more.bin`, read after `memory.safetensors`, as JSON."""
    torch.set_num_threads(threads)
    model = load_model(folder / "model").eval()
    state, _ = load_state(folder / "memory.safetensors", model)
    more = np.frombuffer((folder / "more.bin").read_bytes(), np.uint8)
    print(json.dumps(read(model, more, state).losses[0].tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
