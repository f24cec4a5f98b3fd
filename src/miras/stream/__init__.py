"""Streams: read any number of tokens in constant memory, save what was learned, continue from it,
generate."""

from miras.nn.reading import Piece, StreamState, read_pieces
from miras.stream.files import StateHeader, load_state, read_header, save_state
from miras.stream.generation import Generation, generate
from miras.stream.run import Reading, read

__all__ = [
    "Generation",
    "Piece",
    "Reading",
    "StateHeader",
    "StreamState",
    "generate",
    "load_state",
    "read",
    "read_header",
    "read_pieces",
    "save_state",
]
