"""``make gpu-check``: all checks of a machine with a GPU; docs/gpu-check.md."""
