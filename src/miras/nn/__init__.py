"""Everything that owns a parameter."""
