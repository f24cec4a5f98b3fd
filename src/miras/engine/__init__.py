"""The fast paths, which compute the same as `recurrence`, and `scan`, which chooses among them."""

from miras.engine.scan import graphable, prepare, run, scan

__all__ = ["graphable", "prepare", "run", "scan"]
