"""How much of the machine other processes took while something was timed: as the command line."""

from wnkernel.cli.load import OtherLoad, disturbed

__all__ = ["OtherLoad", "disturbed"]
