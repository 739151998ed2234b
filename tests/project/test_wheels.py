"""Wheels: their names, what pure ones say, the look-up of compiled ones, and the description."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from buildtools import description, prebuilt, wheels
from wnkernel import __version__

from ..processes import PATIENCE_S, ROOT

pytest.importorskip("torch.utils.cpp_extension", reason="building needs setuptools")

NO_COMPILER = {"CXX": "no-such-compiler", "CC": "no-such-compiler"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a build needs, with nothing built."""
    folder = tmp_path / "checkout"
    built = shutil.ignore_patterns("_C*.so", "_build_info.py", "__pycache__")
    for name in ("buildtools", "csrc", "wnkernel"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def setup(checkout: Path, *arguments: str, **environment: str) -> str:
    """Runs setup.py; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=checkout, env=os.environ | {"WNKERNEL_WHEELS": ""} | environment, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize(
    ("environment", "recorded"),
    [
        pytest.param(NO_COMPILER, ("there was no C++ compiler", False), id="no compiler"),
        pytest.param({"WNKERNEL_BUILD": "none"}, ("WNKERNEL_BUILD=none", True), id="asked for"),
        pytest.param(
            {"WNKERNEL_BUILD": "index"}, ("from a wheel for every machine", False), id="index"
        ),
    ],
)
def test_a_wheel_without_the_module_is_for_every_machine_and_says_why(
    checkout, environment, recorded
):
    (checkout / "wnkernel" / "_build_info.py").write_text("TORCH_VERSION = 'of the checkout'")
    setup(checkout, "bdist_wheel", **environment)
    (file,) = (checkout / "dist").iterdir()
    assert file.name == f"wnkernel-{__version__}-py3-none-any.whl"
    said: dict[str, object] = {}
    with zipfile.ZipFile(file) as wheel:
        names = set(wheel.namelist())
        about = f"wnkernel-{__version__}.dist-info/"
        exec(wheel.read("wnkernel/_build_info.py"), said)
        metadata = wheel.read(f"{about}METADATA").decode()
        assert b"Root-Is-Purelib: true" in wheel.read(f"{about}WHEEL")
    assert (said["WHY_PURE"], said["IS_ON_REQUEST"]) == recorded
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "wnkernel").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules | {"wnkernel/_build_info.py"}
    assert not [name for name in names if name.endswith(".so")]
    address = description.repository((ROOT / "pyproject.toml").read_text())
    assert f"Project-URL: Repository, {address}\n" in metadata
    assert "Description-Content-Type: text/markdown\n" in metadata
    assert f"({address}/blob/HEAD/docs/fuse.md)" in metadata


def test_links_in_the_description_are_absolute():
    readme = (ROOT / "README.md").read_text()
    text = description.with_absolute_links(readme, "https://host/name")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)]+)\)", prose)
    assert len(targets) > 20
    assert [target for target in targets if not target.startswith("https://")] == []


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("[a](docs/a.md#b)", "[a](https://h/n/blob/HEAD/docs/a.md#b)"),
        ("![a](b/c.png)", "![a](https://h/n/raw/HEAD/b/c.png)"),
        ("[`a`](#b)", "[`a`](https://h/n#b)"),
        ("[a](https://b.c) [d](mailto:e@f)", "[a](https://b.c) [d](mailto:e@f)"),
        ("`layers[0](x)` ```\na[1](b)\n```", "`layers[0](x)` ```\na[1](b)\n```"),
    ],
)
def test_what_becomes_of_a_link(markdown, expected):
    assert description.with_absolute_links(markdown, "https://h/n") == expected


def test_a_local_version_is_that_of_the_wheel(checkout):
    """In an sdist, too, which has a setup.cfg."""
    (checkout / "setup.cfg").write_text("[egg_info]\ntag_build = \ntag_date = 0\n")
    setup(checkout, "bdist_wheel", WNKERNEL_BUILD="none", WNKERNEL_LOCAL_VERSION="cputorch2.6")
    (file,) = (checkout / "dist").iterdir()
    assert file.name == f"wnkernel-{__version__}+cputorch2.6-py3-none-any.whl"
    with zipfile.ZipFile(file) as wheel:
        about = f"wnkernel-{__version__}+cputorch2.6.dist-info/METADATA"
        assert f"Version: {__version__}+cputorch2.6\n" in wheel.read(about).decode()


def test_names_are_those_that_others_have(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    monkeypatch.setattr(torch, "compiled_with_cxx11_abi", lambda: False)
    monkeypatch.setattr(prebuilt, "python_tag", lambda: "cp310-cp310")
    monkeypatch.setattr(prebuilt.platform, "libc_ver", lambda: ("glibc", "2.18"))
    monkeypatch.setattr(prebuilt.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "linux-x86_64")
    assert list(prebuilt.names("1.2.0", ["cu12", "cpu"])) == [
        f"wnkernel-1.2.0+{kind}torch2.6cxx11abiFALSE-cp310-cp310-{platform}.whl"
        for kind in ("cu12", "cpu")
        for platform in ("manylinux_2_18_x86_64", "manylinux_2_17_x86_64", "linux_x86_64")
    ]
    renamed = "wnkernel-1.2.0+cputorch2.6cxx11abifalse-cp310-cp310-linux_x86_64.whl"
    local = prebuilt.local_version("cpu")
    assert wheels.with_local_version(renamed, local) == renamed.replace("false", "FALSE")


@pytest.mark.parametrize(
    ("cuda", "can_build", "expected"),
    [(None, False, ["cpu"]), ("12.4", True, ["cu12"]), ("13.0", False, ["cu13", "cpu"])],
)
def test_which_kinds_do(monkeypatch, cuda, can_build, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert prebuilt.kinds(can_build) == expected


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A folder with a wheel for this torch, and one for another."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    (name, *_) = prebuilt.names(__version__, ["cpu"])
    for file, torch_version in ((name, torch.__version__), (name.replace("torch2", "torch1"), "1")):
        with zipfile.ZipFile(folder / file, "w") as wheel:
            wheel.writestr("wnkernel/_C.so", "compiled")
            wheel.writestr("wnkernel/_build_info.py", f"TORCH_VERSION = {torch_version!r}")
            wheel.writestr("wnkernel/native.py", "raise ImportError")
    return folder


@pytest.fixture
def url(host: Path) -> Iterator[str]:
    """The folder behind a URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(host)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["folder", "file", "http"])
def test_a_wheel_is_found_where_it_may_be(host, url, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    base = {"folder": str(host), "file": host.as_uri(), "http": url}[kind]
    names = list(prebuilt.names(__version__, ["cpu"]))
    assert prebuilt.look_up(base, iter(["not-there.whl", *names]), tmp_path) == names[0]
    assert (tmp_path / "wnkernel" / "_C.so").read_text() == "compiled"
    assert {path.name for path in (tmp_path / "wnkernel").iterdir()} == {"_C.so", "_build_info.py"}
    assert prebuilt.look_up(base, prebuilt.names("9.9", ["cpu"]), tmp_path) == ""


def test_the_look_up_takes_the_place_of_a_compiler(checkout, host):
    prints = setup(
        checkout, "bdist_wheel", WNKERNEL_WHEELS=str(host), WNKERNEL_BUILD="cpu", **NO_COMPILER
    )
    (name, *_) = prebuilt.names(__version__, ["cpu"])
    assert f"wnkernel: taken from {name}\n" in prints
    (file,) = (checkout / "dist").iterdir()
    assert "-py3-none-any" not in file.name
    with zipfile.ZipFile(file) as wheel:
        assert wheel.read("wnkernel/_C.so") == b"compiled"
        assert wheel.read("wnkernel/native.py") == (ROOT / "wnkernel" / "native.py").read_bytes()


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        pytest.param(lambda host: None, "has no wheel for this torch", id="empty"),
        pytest.param(
            lambda host: (host / next(prebuilt.names(__version__, ["cpu"]))).write_text("no wheel"),
            "cannot be used (File is not a zip file)",
            id="damaged",
        ),
    ],
)
def test_without_a_wheel_it_is_built(checkout, tmp_path, prepare, says):
    empty = tmp_path / "empty"
    empty.mkdir()
    prepare(empty)
    prints = setup(checkout, "build_ext", WNKERNEL_WHEELS=str(empty), **NO_COMPILER)
    assert f"wnkernel: {empty} {says}\n" in prints
    assert "wnkernel: compiled kernels were not built" in prints


@pytest.mark.parametrize("outside", [False, True])
def test_a_virtual_environment_may_see_what_is_outside(tmp_path, outside):
    """Packages of the user, too, which come after its own."""
    venv.create(tmp_path, system_site_packages=outside)
    python = tmp_path / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = subprocess.run(
        [python, "-c", ADDED],
        cwd=ROOT, env=os.environ | {"PYTHONNOUSERSITE": "1"}, check=True, capture_output=True,
        text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    own, *others = done.stdout.split()
    assert Path(own).is_relative_to(tmp_path)
    assert ["user" in others, "base" in others] == [outside, outside]


ADDED = """
import sys, site
sys.path = [path for path in sys.path if "site-packages" not in path]
known = len(sys.path)
from buildtools.environment import add_installed
add_installed()
names = {site.getusersitepackages(): "user", site.getsitepackages([sys.base_prefix])[0]: "base"}
print(*(names.get(path, path) for path in sys.path[known:]))
"""
ISOLATED = """
import sys, site
sys.path = [path for path in sys.path if path not in site.getsitepackages()]
from importlib.util import find_spec
assert find_spec("torch") is None
from buildtools.environment import add_installed
before = [*sys.path]
add_installed()
assert sys.path[:len(before)] == before
print(find_spec("torch").origin)
"""


def test_a_build_in_isolation_finds_the_torch_of_its_environment():
    """pip takes away what the environment has, and runs the same interpreter."""
    if not Path(torch.__file__).is_relative_to(sysconfig.get_path("purelib")):
        pytest.skip("torch is installed somewhere else")
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert Path(done.stdout.strip()) == Path(torch.__file__)
