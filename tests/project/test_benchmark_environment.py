"""What the benchmark calls the machine that it runs on."""

from __future__ import annotations

import dataclasses
import platform

import pytest
import torch

from benchmarks import environment as described
from benchmarks.environment import environment, results_folder

from ..on_the_cpu import on_the_cpu

__all__ = ["on_the_cpu"]

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: {}

processor\t: 1
cpu family\t: 7
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd40
"""


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Intel(R) Xeon(R) Processor", "cpu-intel-xeon-6-207"),
        ("AMD EPYC", "cpu-amd-epyc-6-207"),
        ("Xeon E3-12xx v2 (Ivy Bridge)", "cpu-xeon-e3-12xx-v2-ivy-bridge-6-207"),
        ("QEMU Virtual CPU version 2.5+", "cpu-qemu-virtual-version-2-5-6-207"),
        ("AMD EPYC 9654 96-Core Processor", "cpu-amd-epyc-9654"),
        ("Intel(R) Xeon(R) Platinum 8488C", "cpu-intel-xeon-platinum-8488c"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "cpu-intel-core-i7-9750h"),
    ],
)
def test_results_belong_in_a_folder_of_their_cpu(monkeypatch, tmp_path, name, folder):
    """Family and model are there where the name could be that of many CPUs."""
    monkeypatch.setattr(described, "CPUINFO", tmp_path / "cpuinfo")
    described.CPUINFO.write_text(X86.format(name))
    where = environment("cpu", None)
    assert where.device_name == name
    assert results_folder(where) == folder


def test_a_cpu_without_a_name(monkeypatch, tmp_path):
    monkeypatch.setattr(described, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert results_folder(environment("cpu", None)) == "cpu-aarch64"  # nothing else is told
    described.CPUINFO.write_text(ARM)
    assert results_folder(environment("cpu", None)) == "cpu-aarch64-0x41-0xd40"


def test_results_of_a_card_belong_in_a_folder_of_the_card():
    where = environment("cpu", None)
    card = dataclasses.replace(where, device=torch.device("cuda", 0), device_name="NVIDIA H200")
    assert results_folder(card) == "nvidia-h200"
