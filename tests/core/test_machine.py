"""Facts of the machine: which source is believed, what the environment says, and no bit of a result
depends on any of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from wnkernel import native

from ..processes import python

pytestmark = pytest.mark.skipif(not native.loaded(), reason=native.load_error())

KiB, MiB = 2**10, 2**20
DEFAULTS = {"l1d": 32 * KiB, "l2": 256 * KiB, "l3": MiB}

# (level, type, size, shared_cpu_list), as the files of a CPU say it; None: there is no such file
Files = tuple[str | None, str | None, str | None, str | None]
L1D: Files = ("1", "Data", "48K", "0,4")
L1I: Files = ("1", "Instruction", "16K", "0,4")
L2: Files = ("2", "Unified", "2048K", "0,4")
L3: Files = ("3", "Unified", "16384K", "0-7")
NORMAL = [L1D, L1I, L2, L3]
FACTS = {"l1d": 48 * KiB, "l2": MiB, "l3": 2 * MiB}

# eax, ebx, ecx of leaf 4 on an Intel Xeon in a virtual machine, and of AMD's leaf on a Zen 3
INTEL = [
    (0x04000121, 0x02C0003F, 0x3F),
    (0x04000122, 0x01C0003F, 0x3F),
    (0x04000143, 0x03C0003F, 0x7FF),
    (0x04004163, 0x04C0003F, 0x33FFF),
]
AMD = [
    (0x4121, 0x01C0003F, 0x3F),
    (0x4122, 0x01C0003F, 0x3F),
    (0x4143, 0x01C0003F, 0x3FF),
    (0x3C163, 0x03C0003F, 0x7FFF),
]
TOLD_BY_AMD = {"l1d": 32 * KiB, "l2": 256 * KiB, "l3": 2 * MiB}


def write(root: Path, caches: list[Files], cpu: int = 0) -> None:
    for index, files in enumerate(caches):
        folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        names = ("level", "type", "size", "shared_cpu_list")
        for name, content in zip(names, files, strict=True):
            if content is not None:
                (folder / name).write_text(content + "\n")


def facts(root: Path, cpus=(0,), cpuid=()) -> tuple[dict, dict]:
    """Bytes and sources of the three levels."""
    found = native._C.machine_in(str(root), list(cpus), list(cpuid))
    sources = found.pop("sources")
    assert (found.pop("page"), sources.pop("page")) == (os.sysconf("SC_PAGESIZE"), "system")
    return found, sources


def all_from(source: str) -> dict[str, str]:
    return dict.fromkeys(("l1d", "l2", "l3"), source)


def test_sysfs(tmp_path):
    write(tmp_path, NORMAL)
    assert facts(tmp_path, cpuid=AMD) == (FACTS, all_from("sysfs"))


@pytest.mark.parametrize(
    ("size", "shared", "l3"),
    [
        ("32768K", "0-7", 4 * MiB),
        ("32768K", "0-3,8-11", 4 * MiB),
        ("32M", "0,2,4,6,8-11", 4 * MiB),
        ("4194304", "3", 4 * MiB),
    ],
)
def test_a_cache_is_divided_among_those_that_share_it(tmp_path, size, shared, l3):
    write(tmp_path, [L1D, L2, ("3", "Unified", size, shared)])
    found, sources = facts(tmp_path)
    assert (found["l3"], sources["l3"]) == (l3, "sysfs")


WRONG_SIZES = [None, "0", "0K", "-48K", "", "big", "48KB", "48 K", "K", "0x30000", "1"]
WRONG_SIZES += ["2G", "99999999999M", "9" * 40, str(2**64 + 49152)]
WRONG_LISTS = ["", "all", "-1", "0-", "7-0", "7-0,0-15", "0,,1", "0-3,x", "0-99999999999"]


def asked_of_the_next_source(root: Path, level: int, size: str | None, shared: str | None) -> None:
    """For that level alone."""
    caches = [L1D, L2, L3]
    caches[level - 1] = (str(level), "Unified", size, shared)
    write(root, caches)
    name = ("l1d", "l2", "l3")[level - 1]
    expected = FACTS | {name: TOLD_BY_AMD[name]}, all_from("sysfs") | {name: "cpuid"}
    assert facts(root, cpuid=AMD) == expected


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("size", WRONG_SIZES)
def test_a_size_that_cannot_be(tmp_path, level, size):
    asked_of_the_next_source(tmp_path, level, size, "0-1")


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("shared", WRONG_LISTS)
def test_a_list_of_cpus_that_cannot_be(tmp_path, level, shared):
    asked_of_the_next_source(tmp_path, level, "4M", shared)


@pytest.mark.parametrize("missing", range(4))
def test_a_file_that_is_missing(tmp_path, missing):
    """Or cannot be read: here it is a folder."""
    name = ("level", "type", "size", "shared_cpu_list")[missing]
    without: Files = tuple(None if k == missing else x for k, x in enumerate(L2))
    write(tmp_path, [L1D, without, L3])
    expected = FACTS | {"l2": TOLD_BY_AMD["l2"]}, all_from("sysfs") | {"l2": "cpuid"}
    assert facts(tmp_path, cpuid=AMD) == expected
    (tmp_path / "cpu0" / "cache" / "index1" / name).mkdir()
    assert facts(tmp_path, cpuid=AMD) == expected


def test_instructions_and_a_fourth_level_do_not_count(tmp_path):
    write(tmp_path, [L1I, L1D, L2, L3, ("4", "Unified", "65536K", "0-7")])
    assert facts(tmp_path)[0] == FACTS


def test_without_a_third_level_the_second_is_the_last(tmp_path):
    write(tmp_path, [L1D, L1I, L2])
    assert facts(tmp_path) == (FACTS | {"l3": MiB}, all_from("sysfs"))


def test_the_smallest_of_several_kinds_of_cores(tmp_path):
    write(tmp_path, NORMAL, cpu=0)
    small = [("1", "Data", "32K", "16"), L1I, ("2", "Unified", "2048K", "16-19"), L3]
    write(tmp_path, small, cpu=16)
    assert facts(tmp_path, cpus=[0, 16])[0] == FACTS | {"l1d": 32 * KiB, "l2": 512 * KiB}
    assert facts(tmp_path, cpus=[0])[0] == FACTS
    many = [0] * 200 + [16] * 100  # of which some are looked at
    assert facts(tmp_path, cpus=many) == facts(tmp_path, cpus=[0, 16])
    (tmp_path / "cpu16" / "cache" / "index0" / "size").write_text("0")
    assert facts(tmp_path, cpus=[0, 16])[0] == FACTS | {"l2": 512 * KiB}


def test_cpus_that_are_not_there(tmp_path):
    write(tmp_path, NORMAL, cpu=3)
    assert facts(tmp_path, cpus=range(1000, 1300)) == (DEFAULTS, all_from("default"))
    assert facts(tmp_path, cpus=[]) == (DEFAULTS, all_from("default"))
    assert facts(tmp_path, cpus=[1, 2, 3]) == (FACTS, all_from("sysfs"))


@pytest.mark.parametrize(
    ("registers", "expected"),
    [(AMD, TOLD_BY_AMD), (INTEL, {"l1d": 48 * KiB, "l2": 2 * MiB, "l3": 48 * MiB})],
    ids=["AMD", "Intel"],
)
def test_cpuid(tmp_path, registers, expected):
    assert facts(tmp_path / "nowhere", cpuid=registers) == (expected, all_from("cpuid"))


def test_cpuid_that_says_nothing(tmp_path):
    nothing = [(0, 0, 0), (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), (0x21, 0, 0)]
    assert facts(tmp_path, cpuid=nothing) == (DEFAULTS, all_from("default"))


def test_nobody_has_a_whole_third_level(tmp_path):
    write(tmp_path, [L1D, L2, ("3", "Unified", "266240K", "0-1")])
    found, sources = facts(tmp_path)
    assert (found["l3"], sources["l3"]) == (48 * MiB, "sysfs")
    assert facts(tmp_path / "nowhere", cpuid=INTEL)[0]["l3"] == 48 * MiB


def said_by_info(**environment: str) -> dict:
    """In a process of its own."""
    result = python("-m", "wnkernel", **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["cpu"]


def test_this_machine():
    """Settings that are empty are none."""
    names = ("l1d", "l2", "l3")
    cpu = said_by_info(**{f"WNKERNEL_CPU_{name.upper()}": "" for name in names})
    assert list(cpu) == [*names, "page", "sources"]
    assert set(cpu["sources"].values()) <= {"sysfs", "cpuid", "system", "default"}
    read = [name for name in names if cpu["sources"][name] == "sysfs"]
    if not read:
        pytest.skip("there is no sysfs here")
    folder = Path("/sys/devices/system/cpu")
    found, _ = facts(folder, sorted(os.sched_getaffinity(0)))
    assert {name: cpu[name] for name in read} == {name: found[name] for name in read}


def test_the_environment_comes_first():
    sizes = {"WNKERNEL_CPU_L1D": "4K", "WNKERNEL_CPU_L2": "3M", "WNKERNEL_CPU_L3": "1073741824"}
    cpu = said_by_info(**sizes)
    assert (cpu["l1d"], cpu["l2"], cpu["l3"]) == (4 * KiB, 3 * MiB, 1024 * MiB)
    assert cpu["sources"] == all_from("environment") | {"page": "system"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("L1D", "0"),
        ("L1D", "2M"),
        ("L3", "lots"),
        ("L3", "99999999999999999999"),
    ],
)
def test_nonsense_in_the_environment_is_an_error_of_the_import(name, value):
    result = python("-c", "import wnkernel", **{f"WNKERNEL_CPU_{name}": value})
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: WNKERNEL_CPU_{name}: expected ")
    assert last.endswith(f" got {value}")


BITS = """
import hashlib, torch, wnkernel
from tests.cases import randn, randn_g
from wnkernel import functional as F

torch.manual_seed(0)
SHAPES = {  # rows in chunks, in pieces; columns, narrow and wide; results that are large
    (700, 65): (0, 1), (2, 70001): (0, 1), (70001, 2): (1, None), (90, 200, 3): (0, 1, 2),
    (6, 40, 300): (1,), (3, 20011): (None,), (1024, 1024, 2): (0, 1, 2),
}
for dtype in (torch.bfloat16, torch.float32, torch.float64):
    for shape, dims in SHAPES.items():
        for dim in dims:
            v, g = randn(shape, dtype).requires_grad_(), randn_g(shape, dim, dtype).requires_grad_()
            w = F.weight_norm(v, g, dim)
            grads = torch.autograd.grad(w, (v, g), randn(shape, dtype))
            for x in (w, *grads):
                plain = x.detach().contiguous().flatten().view(torch.uint8).numpy()
                print(dtype, shape, dim, hashlib.sha256(plain).hexdigest())
"""


def test_bits_do_not_depend_on_them():
    settings = [
        {},
        {"WNKERNEL_CPU_L1D": "4K", "WNKERNEL_CPU_L2": "16K", "WNKERNEL_CPU_L3": "16K"},
        {"WNKERNEL_CPU_L1D": "1M", "WNKERNEL_CPU_L2": "64M", "WNKERNEL_CPU_L3": "1024M"},
        {"WNKERNEL_CPU_L1D": "20000", "WNKERNEL_CPU_L2": "77777", "WNKERNEL_CPU_L3": "999999"},
    ]
    results = [python("-c", BITS, WNKERNEL_BACKEND="cpu", **setting) for setting in settings]
    for result in results:
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines() == results[0].stdout.splitlines()
    assert len(results[0].stdout.splitlines()) == 3 * 3 * 14
