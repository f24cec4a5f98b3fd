"""HTML pages: a text coloured by surprise, and the charts and page frame that other pages use."""

__all__: list[str] = []
