"""A self-contained HTML report of a demo run; needs the standard library only."""

from .model import (
    AccuracyPoint,
    AccuracySeries,
    ConditionAverage,
    Curve,
    DemoReport,
    GeneratedText,
    Header,
    HeadlineRow,
    LearningAct,
    ModelCard,
    NeedleAccuracy,
    NeedleAct,
    SavedMemory,
    SurpriseLayer,
    SurprisePage,
    Timing,
    wilson_interval,
)
from .page import render_report, write_report

__all__ = [
    "AccuracyPoint",
    "AccuracySeries",
    "ConditionAverage",
    "Curve",
    "DemoReport",
    "GeneratedText",
    "Header",
    "HeadlineRow",
    "LearningAct",
    "ModelCard",
    "NeedleAccuracy",
    "NeedleAct",
    "SavedMemory",
    "SurpriseLayer",
    "SurprisePage",
    "Timing",
    "render_report",
    "wilson_interval",
    "write_report",
]
