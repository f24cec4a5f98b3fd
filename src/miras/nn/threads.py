"""How many threads torch may use, as `--threads` says."""

import torch


def set_threads(threads: int) -> None:
    """Give torch that many threads; 0 leaves torch's choice. Raises ValueError for a negative number."""
    if threads < 0:
        raise ValueError(f"--threads must be 0 (torch's choice) or more, got {threads}")
    if threads:
        torch.set_num_threads(threads)
