"""Key layouts: loading from each of them, and conversions of state dicts."""
