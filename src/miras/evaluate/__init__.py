"""What a model does with a long stream: bits per byte along it, and needles found in it."""

from miras.evaluate.needle import NeedleResult, Track, needle_accuracy, wilson
from miras.evaluate.stream import CONDITIONS, Curve, stream_curve

__all__ = ["CONDITIONS", "Curve", "NeedleResult", "Track", "needle_accuracy", "stream_curve", "wilson"]
