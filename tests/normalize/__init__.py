"""normalize_, norms_of and normalize_after_step: rows that get a norm, in place."""
