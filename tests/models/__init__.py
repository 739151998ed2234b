"""Layers and whole models: assigning, convert, fold, initialisation, removers, pickles."""
