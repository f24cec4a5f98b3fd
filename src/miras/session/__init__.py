"""Sessions: a memory that is fed for days, forked, rewound, compared, saved, and asked what it remembers."""
