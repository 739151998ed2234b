"""Forced weight norm: EDM2's layers, whose v is written to in a training forward."""
