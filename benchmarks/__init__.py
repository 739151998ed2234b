"""Measures what wnkernel costs beside PyTorch's weight norms: ``python -m benchmarks --help``."""
