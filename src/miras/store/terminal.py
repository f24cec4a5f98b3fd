"""Text that is safe to show on a terminal."""


def printable(text: str) -> str:
    """A text without control characters, with which a file could control the terminal."""
    return "".join(x for x in text if x in "\n\t" or x.isprintable())
