"""Text and numbers as a page shows them."""

import math

_CONTROLS = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
)
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def visible(text: str) -> str:
    """Control characters and lone surrogates, each replaced by a character that HTML can hold."""
    return text.translate(_CONTROLS)


def number(value: float, digits: int = 4) -> str:
    """A number to `digits` significant digits, with thousands separators and no exponent if
    short."""
    if not math.isfinite(value):
        return "not measured"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude > 15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    if float(value).is_integer():
        return f"{int(value):,}"
    shown = f"{value:,.{max(0, digits - 1 - magnitude)}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def raw(value: float, digits: int = 5) -> str:
    """A number that can be parsed back: integers exactly, others to `digits` digits."""
    return str(int(value)) if float(value).is_integer() else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """A wall-clock time, such as 8.31 s, 2 min 5 s or 1 h 12 min."""
    if seconds < 60:
        return f"{number(seconds, 3)}\u00a0s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60}\u00a0min"
