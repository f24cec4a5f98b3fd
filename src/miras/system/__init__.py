"""What the operating system is asked for: signals, files that appear whole, locks; the standard library alone."""
