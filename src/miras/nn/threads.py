"""Torch settings of the command line: threads and random seed."""

import torch

MOST_THREADS = 1024
"""More than is useful, and few enough for the system to provide."""


def set_threads(threads: int) -> None:
    """Set the number of torch threads; 0 keeps torch's default. Raises ValueError for an invalid
    number."""
    if not 0 <= threads <= MOST_THREADS:
        raise ValueError(f"--threads must be 0 (torch's default) to {MOST_THREADS}, got {threads}")
    if threads:
        torch.set_num_threads(threads)


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that random number generators do not accept."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be 0 or more and below 2^63, got {seed}")
