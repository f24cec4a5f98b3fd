"""`miras demo`: a needle in a million, learning to read, and a page to look at."""
