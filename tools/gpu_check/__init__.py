"""``make gpu-check``: everything there is to check on a machine with a GPU; docs/gpu-check.md."""
