"""Escaping of text and formatting of numbers for the page."""

from __future__ import annotations

import html
import math
import unicodedata

_SPACE = "\u00a0"
_CONTROLS = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
)


def visible(text: str) -> str:
    """Replace control characters and lone surrogates, one for one, by signs that HTML can hold."""
    return text.translate(_CONTROLS)


def esc(text: str) -> str:
    """Escape text for use in an element or a quoted attribute."""
    return html.escape(visible(text.replace("\r\n", "\n")), quote=True)


def clusters(text: str, columns: list[list[float]]) -> tuple[list[str], list[list[float]]]:
    """Join combining marks and CR LF to one sign each, keeping the larger value in every column."""
    signs: list[str] = []
    joined: list[list[float]] = [[] for _ in columns]
    for index, char in enumerate(text):
        after_return = index > 0 and text[index - 1] == "\r" and char == "\n"
        combines = unicodedata.category(char)[0] == "M" or char == "\u200d"
        if signs and (after_return or combines or signs[-1].endswith("\u200d")):
            signs[-1] = "\n" if after_return else signs[-1] + visible(char)
            for values, column in zip(joined, columns, strict=True):
                values[-1] = _larger(values[-1], column[index])
            continue
        signs.append("\n" if char == "\r" else visible(char))
        for values, column in zip(joined, columns, strict=True):
            values.append(column[index])
    return signs, joined


def number(value: float, digits: int = 4) -> str:
    """Format a number to `digits` significant digits, with thousands separators and no exponent if short."""
    if not math.isfinite(value):
        return "not measured"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude > 15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        trimmed = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{trimmed} × 10{_superscript(int(exponent))}"
    if float(value).is_integer():
        return f"{int(value):,}"
    decimals = max(0, digits - 1 - magnitude)
    shown = f"{value:,.{decimals}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def raw(value: float, digits: int = 5) -> str:
    """Format a number so that it can be parsed back: integers exactly, others to `digits` digits."""
    return str(int(value)) if float(value).is_integer() else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Format a wall-clock time, such as 8.31 s, 2 min 5 s or 1 h 12 min."""
    if seconds < 60:
        return f"{number(seconds, 3)}{_SPACE}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{_SPACE}min {whole % 60}{_SPACE}s"
    return f"{whole // 3600}{_SPACE}h {whole % 3600 // 60}{_SPACE}min"


def short_count(value: float) -> str:
    """Format a count for an axis: powers of two as 64K (of 1,024), others as 10k or 2M."""
    if is_binary(value):
        return f"{int(value) >> 20}M" if value >= 1 << 20 else f"{int(value) >> 10}K"
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


def is_binary(value: float) -> bool:
    """Say whether a count is a power of two of at least 1,024."""
    whole = int(value)
    return whole == value and whole >= 1024 and whole & (whole - 1) == 0


def _larger(first: float, second: float) -> float:
    """Return the larger of two values, passing over NaN."""
    return second if math.isnan(first) or second > first else first


def _superscript(exponent: int) -> str:
    """Write an integer in superscript digits."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
