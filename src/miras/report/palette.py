"""Colours of the page in both themes, with the ramp for surprise computed in OKLCH."""

from __future__ import annotations

import math

LEVELS = "abcdefghijklmnopqrstuvwx"

LIGHT = {
    "paper": "#fbfaf6",
    "card": "#fffefb",
    "sunk": "#f3f0e8",
    "ink": "#23211d",
    "muted": "#615c52",
    "rule": "#ddd7c9",
    "grid": "#e9e4d9",
    "good": "#1c6b43",
    "bad": "#a12d2a",
    "read": "#201d18",
    "c0": "#0a5f96",
    "c1": "#b04a08",
    "c2": "#00735c",
    "c3": "#86428f",
    "c4": "#5f6672",
    "c5": "#7b6200",
}
DARK = {
    "paper": "#131519",
    "card": "#191c21",
    "sunk": "#20242a",
    "ink": "#e9e6df",
    "muted": "#a8a498",
    "rule": "#353a42",
    "grid": "#2a2e35",
    "good": "#7ccf9f",
    "bad": "#f2938c",
    "read": "#f5f1e8",
    "c0": "#74bdf2",
    "c1": "#f2a468",
    "c2": "#5fcfb0",
    "c3": "#d8a3e2",
    "c4": "#aeb6c2",
    "c5": "#d9bf5a",
}


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """Return the sRGB hex colour nearest to an OKLCH colour (hue in degrees), lowering chroma to fit."""
    while True:
        channels = _linear(lightness, chroma, math.radians(hue))
        if chroma <= 0 or all(-1e-4 <= c <= 1.0001 for c in channels):
            return "#" + "".join(f"{_gamma(c):02x}" for c in channels)
        chroma = max(0.0, chroma - 0.004)


def ramp(dark: bool) -> list[str]:
    """Return the background colour of each of the levels, from calm to surprised, for one theme."""
    colours = []
    for k in range(len(LEVELS)):
        t = k / (len(LEVELS) - 1)
        if dark:
            colours.append(oklch(0.228 + 0.302 * t, 0.010 + 0.165 * t**1.1, 275 + 115 * t))
        else:
            colours.append(oklch(0.988 - 0.268 * t**1.5, 0.006 + 0.170 * t**1.3, 96 - 62 * t))
    return colours


def luminance(colour: str) -> float:
    """Return the WCAG relative luminance of a hex colour."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """Return the WCAG contrast ratio of two hex colours."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def theme_css() -> str:
    """Return the custom properties of both themes; paper always prints light."""
    light, dark = _properties(LIGHT, ramp(False)), _properties(DARK, ramp(True))
    levels = "".join(
        f"i.{name}{{background:var(--{name})}}rect.{name}{{fill:var(--{name})}}" for name in LEVELS
    )
    return (
        f":root{{color-scheme:light;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light])"
        f"{{color-scheme:dark;{dark}}}}}"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}{levels}"
    )


def _properties(theme: dict[str, str], levels: list[str]) -> str:
    """Write one theme as CSS custom properties."""
    named = theme | dict(zip(LEVELS, levels, strict=True))
    return ";".join(f"--{name}:{colour}" for name, colour in named.items())


def _linear(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """Convert OKLCH (hue in radians) to linear sRGB."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _gamma(channel: float) -> int:
    """Convert one linear channel to an sRGB byte."""
    clipped = min(1.0, max(0.0, channel))
    curved = 12.92 * clipped if clipped <= 0.0031308 else 1.055 * clipped ** (1 / 2.4) - 0.055
    return round(255 * curved)
