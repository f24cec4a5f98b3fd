"""Kernels: each a drop-in for one function of core, chosen here and nowhere else."""

from miras.core.scan import scan

__all__ = ["scan"]
