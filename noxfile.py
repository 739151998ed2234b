"""The legs of tests/matrix.py, each in an environment of its own: ``make test-matrix``.

What is tested is what is committed. ``-- --discard`` deletes an environment, of about 5 GB, after
its leg.
"""

import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))  # importing the package `tests` takes torch

from matrix import LEGS, PACKAGES, RESULTS, Leg  # noqa: E402

nox.options.error_on_missing_interpreters = False  # such legs are reported as skipped


def define(leg: Leg) -> None:
    """Makes a session of a leg."""

    @nox.session(name=leg.name, python=leg.python)
    def session(session: nox.Session) -> None:
        """Builds the compiled module, runs the tests, writes docs/versions/*.json."""
        environment = Path(session.virtualenv.location).resolve()
        try:
            try_leg(session, leg, environment / "tree")
        finally:
            if "--discard" in session.posargs:
                shutil.rmtree(environment)


def try_leg(session: nox.Session, leg: Leg, tree: Path) -> None:
    """In a checkout of its own, for compiled modules of two versions have the same name."""
    out = RESULTS / f"{leg.name}.json"
    out.unlink(missing_ok=True)  # what another commit gave
    session.run("git", "init", "-q", str(tree), external=True)
    session.chdir(tree)
    session.run("git", "fetch", "-q", str(ROOT), "HEAD", external=True)
    session.run("git", "checkout", "-q", "--detach", "FETCH_HEAD", external=True)
    commit = session.run("git", "rev-parse", "--short", "HEAD", external=True, silent=True).strip()
    session.install("--no-cache-dir", *leg.requirements)
    session.install("--no-cache-dir", *PACKAGES)
    build = {"WNKERNEL_BUILD": "cpu"}
    session.run("python", "setup.py", "-q", "build_ext", "--inplace", env=build)
    session.run("python", "-m", "tests.matrix", "run", str(out), commit)


for each in LEGS:
    define(each)
