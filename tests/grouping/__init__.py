"""Groups: one launch for all weights of a model."""
