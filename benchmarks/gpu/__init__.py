"""The benchmark for a machine with a GPU, which ``make gpu-check`` runs."""
