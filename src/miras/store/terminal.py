"""What may be shown on a terminal."""


def printable(text: str) -> str:
    """A text without its control characters, by which a file's content could command a terminal."""
    return "".join(x for x in text if x in "\n\t" or x.isprintable())
