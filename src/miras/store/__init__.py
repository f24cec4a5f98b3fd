"""Files that appear whole, checksums, locks and signals; the standard library alone."""
