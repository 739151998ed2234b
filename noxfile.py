"""Sessions of nox, each in its own environment of about 5 GB.

``make test-matrix`` runs the legs of tests/matrix.py. ``make test-oldest`` tests the command line
with the lower bounds of its packages. A session tests the commit at HEAD, not the working tree.
With ``-- --discard`` it deletes its environment at the end.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))  # an import of the package `tests` would import torch

from matrix import LEGS, PACKAGES, RESULTS, TIMEOUT_S, Leg  # noqa: E402

nox.options.error_on_missing_interpreters = False  # legs without their Python are skipped


def define(leg: Leg) -> None:
    """Define the session of a leg."""

    @nox.session(name=leg.name, python=leg.python)
    def session(session: nox.Session) -> None:
        """Run the tests of a leg, and write its file in docs/versions/."""
        out = RESULTS / f"{leg.name}.json"
        out.unlink(missing_ok=True)  # the file may be of another commit
        with built(session, *leg.requirements) as commit:
            session.run("python", "-m", "tests.matrix", "run", str(out), commit)


CLI_LEG = next(leg for leg in LEGS if leg.name == "torch-2.13.0-py3.11")


@nox.session(name="oldest", python=CLI_LEG.python, default=False)
def oldest(session: nox.Session) -> None:
    """Run the tests of the command line with the lower bounds of its packages."""
    extras = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    bounds = [requirement.replace(">=", "==") for requirement in extras["cli"]]
    with built(session, *CLI_LEG.requirements):
        session.install(*bounds, "click<8.2")  # typer 0.18 allows 8.2, where commands changed
        pytest = "python", "-m", "pytest", "-n", "2", f"--timeout={TIMEOUT_S}"
        passive = {"OMP_WAIT_POLICY": "passive"}
        session.run(*pytest, *sorted(glob("tests/cli/test_*.py")), env=passive)


@contextmanager
def built(session: nox.Session, *requirements: str) -> Iterator[str]:
    """Check out HEAD in the environment of a session, build the compiled module, yield the commit.

    Each session has its own checkout, because compiled modules for two versions of torch have the
    same name. At the end ``--discard`` deletes the environment.
    """
    environment = Path(session.virtualenv.location).resolve()
    try:
        tree = environment / "tree"
        session.run("git", "init", "-q", str(tree), external=True)
        session.chdir(tree)
        session.run("git", "fetch", "-q", str(ROOT), "HEAD", external=True)
        session.run("git", "checkout", "-q", "--detach", "FETCH_HEAD", external=True)
        session.install("--no-cache-dir", *requirements)
        session.install("--no-cache-dir", *PACKAGES)
        only_cpu = {"WNKERNEL_BUILD": "cpu"}
        session.run("python", "setup.py", "-q", "build_ext", "--inplace", env=only_cpu)
        commit = session.run("git", "rev-parse", "--short", "HEAD", external=True, silent=True)
        yield commit.strip()
    finally:
        if "--discard" in session.posargs:
            shutil.rmtree(environment)


for each in LEGS:
    define(each)
