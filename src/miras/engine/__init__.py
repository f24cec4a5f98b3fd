"""Every faster way to the numbers of `recurrence`, and `scan`, which chooses among them."""

from miras.engine.scan import graphable, prepare, run, scan

__all__ = ["graphable", "prepare", "run", "scan"]
