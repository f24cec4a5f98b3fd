"""Pages to look at: a text coloured by surprise, and the charts and the frame that other pages build on."""

__all__: list[str] = []
