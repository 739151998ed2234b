"""The legs of tests/matrix.py, each in an environment of its own: ``make test-matrix``; and the
command line with the lower bounds of its packages: ``make test-oldest``.

What is tested is what is committed. ``-- --discard`` deletes an environment, of about 5 GB,
afterwards.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))  # importing the package `tests` takes torch

from matrix import LEGS, PACKAGES, RESULTS, TIMEOUT_S, Leg  # noqa: E402

nox.options.error_on_missing_interpreters = False  # such legs are reported as skipped


def define(leg: Leg) -> None:
    """Makes a session of a leg."""

    @nox.session(name=leg.name, python=leg.python)
    def session(session: nox.Session) -> None:
        """Runs the tests, writes docs/versions/*.json."""
        out = RESULTS / f"{leg.name}.json"
        out.unlink(missing_ok=True)  # what another commit gave
        with built(session, *leg.requirements) as commit:
            session.run("python", "-m", "tests.matrix", "run", str(out), commit)


CLI_LEG = next(leg for leg in LEGS if leg.name == "torch-2.13.0-py3.11")


@nox.session(name="oldest", python=CLI_LEG.python, default=False)
def oldest(session: nox.Session) -> None:
    """Runs the tests of the command line with the lower bounds of its packages."""
    extras = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    bounds = [requirement.replace(">=", "==") for requirement in extras["cli"]]
    with built(session, *CLI_LEG.requirements):
        session.install(*bounds, "click<8.2")  # typer 0.18 takes it; 8.2 changed what commands do
        pytest = "python", "-m", "pytest", "-n", "2", f"--timeout={TIMEOUT_S}"
        passive = {"OMP_WAIT_POLICY": "passive"}
        session.run(*pytest, *sorted(glob("tests/cli/test_*.py")), env=passive)


@contextmanager
def built(session: nox.Session, *requirements: str) -> Iterator[str]:
    """A checkout with the compiled module in the session's environment; yields the commit.

    The checkout is the session's own, for compiled modules of two versions have one name. At the
    end ``--discard`` deletes the environment.
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
