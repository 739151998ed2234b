"""What runs on a machine with a GPU: ``make gpu-check``, and the benchmark behind it."""
