"""What the command line tells torch: how many threads it may use, and where its random numbers begin."""

import torch

MOST_THREADS = 1024
"""Far more than help, and few enough that the system gives them."""


def set_threads(threads: int) -> None:
    """Give torch that many threads; 0 leaves torch's choice. Raises ValueError for a number that cannot be."""
    if not 0 <= threads <= MOST_THREADS:
        raise ValueError(f"--threads must be 0 (torch's default) to {MOST_THREADS}, got {threads}")
    if threads:
        torch.set_num_threads(threads)


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that random number generators do not take."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be 0 or more and below 2^63, got {seed}")
