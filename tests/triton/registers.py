"""``python -m tests.triton.registers``: a thread's registers in the kernels for lists, as a table
in Markdown, with the Triton that is installed. Compiles for GPUs that need not be there.

Where the assembler puts numbers aside, their bytes follow.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import triton
import typer

from .offline_checks import DTYPES
from .offline_process import Ask, worker

LISTS = {
    "rows only": (False, 0),
    "every tile": (True, 0),
    "every tile, launch 2": (True, 1),
}
"""Whether every tile is in it, and which launch it is."""


def cell(ask: Ask, gpu: str, dtypes: str, direction: str, of: str) -> str:
    """Registers, and bytes that are spilled."""
    every, finish = LISTS[of]
    request = {
        "dtypes": DTYPES[dtypes], "direction": direction, "tile": None, "every": every,
        "finish": finish, "changes": {}, "disassemble": False,
    }  # fmt: skip
    (facts,) = ask(gpu, [request])
    spilled = f" + {facts['spilled_bytes']} B" if facts["spilled_bytes"] else ""
    return f"{facts['registers']}{spilled}"


def main(
    gpu: Annotated[list[str] | None, typer.Option(help="cuda80, cuda90, cuda100, gfx942.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, backward.")] = None,
    of: Annotated[list[str] | None, typer.Option(help="Kinds of lists: every tile, ...")] = None,
) -> None:
    """Compile, and print a line at a time."""
    print("| Triton", triton.__version__, "|", " | ".join(DTYPES), "|")
    print("|---" * (1 + len(DTYPES)), "|", sep="")
    with TemporaryDirectory() as folder, worker(Path(folder)) as ask:
        for name in gpu or ("cuda80", "cuda90", "cuda100"):
            for way in direction or ("forward", "backward"):
                for what in of or LISTS:
                    cells = [cell(ask, name, dtypes, way, what) for dtypes in DTYPES]
                    line = f"| {name}, {way}, {what} |", " | ".join(cells), "|"
                    print(*line, flush=True)


if __name__ == "__main__":
    typer.run(main)
