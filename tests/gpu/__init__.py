"""Machines with a GPU: what runs on one, and the checks that are taken there."""
