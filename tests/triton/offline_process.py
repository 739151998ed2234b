"""The process of triton_offline_worker.py, and what it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..processes import PATIENCE_S, ROOT
from .offline_checks import CUOBJDUMP

SECONDS = 2 * PATIENCE_S
"""For an answer: with WNKERNEL_OFFLINE_ALL one takes minutes."""

Ask = Callable[..., Any]
"""A GPU, and variants to compile for it or none, to what the worker says."""


@contextmanager
def worker(folder: Path) -> Iterator[Ask]:
    """Asks a worker. Nothing that was compiled or set before counts; ``folder`` is its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    log = folder / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.triton.offline_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, cwd=ROOT, env=environment,
        ) as process,
    ):  # fmt: skip

        def ask(gpu: str, variants: list[dict[str, Any]] | None = None) -> Any:
            request = {"gpu": gpu, "variants": variants, "cuobjdump": str(CUOBJDUMP)}
            watchdog = threading.Timer(SECONDS, process.kill)
            watchdog.start()
            try:
                print(json.dumps(request), file=process.stdin, flush=True)
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            finally:
                watchdog.cancel()
            assert answer, f"the worker ended with {process.wait()}:\n{log.read_text()}"
            return json.loads(answer)

        yield ask
        with suppress(BrokenPipeError):
            process.stdin.close()
