"""Sessions: a memory that can be fed for days, forked, rewound, compared, saved, and tested for
what it remembers."""
