"""Atomic writes, checksums, locks and signals; standard library only."""
