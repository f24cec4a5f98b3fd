"""Evaluation on long streams: bits per byte, and retrieval of needles."""

from miras.evaluate.needle import NeedleResult, Track, needle_accuracy, wilson
from miras.evaluate.stream import CONDITIONS, Curve, stream_curve

__all__ = ["CONDITIONS", "Curve", "NeedleResult", "Track", "needle_accuracy", "stream_curve", "wilson"]
