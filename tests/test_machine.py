"""What a process may use of this machine, and by which name its user goes."""

import getpass
import math
import os
import sys
from ctypes.util import find_library
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import machine
from pipeline.tiling import GIB, free_gib
from workflows.__main__ import main


def put_into_groups(folder: Path, monkeypatch: pytest.MonkeyPatch, groups: str | None, files: dict[str, str]) -> None:
    """Have the control groups of Linux, and this process's among them, told by files in a folder."""
    if groups is not None:
        (folder / "own").write_text(groups)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(machine, "_GROUPS", folder)
    monkeypatch.setattr(machine, "_OWN_GROUPS", folder / "own")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/jobs/7\n", {"jobs/cpu.max": "400000 100000\n", "jobs/7/cpu.max": "max 100000\n"}, 4),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000\n"}, 2),
        ("3:cpuset:/a\n2:cpu,cpuacct:/a\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ("2:cpuacct,cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "600000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 6),
        ("2:cpuset:/a\n", {"cpuset/a/cpu.max": "100000 100000\n"}, 64),
        (None, {}, 64),
    ],
)
def test_a_container_has_the_processors_that_it_is_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str | None, files: dict[str, str], expected: int
) -> None:
    put_into_groups(tmp_path, monkeypatch, groups, files)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: range(64), raising=False)
    assert machine.cores() == expected


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "1000\n"}, 1000),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "900\n"}, math.inf),
        ("0::/job/step\n", {"job/memory.max": "1400\n", "job/step/memory.max": "max\n"}, 1400),
        ("0::/job/step\n", {"job/memory.max": "1400\n", "job/memory.current": "500\n", "job/step/memory.max": "950\n"}, 900),
        (
            "0::/job\n",
            {
                "job/memory.max": "1400\n",
                "job/memory.current": "1000\n",
                "job/memory.stat": "anon 300\nfile 700\ninactive_file 600\nactive_file 50\n",
            },
            1050,
        ),
        (
            "4:memory:/job/step\n3:cpu:/\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/job/memory.limit_in_bytes": "2000\n",
                "memory/job/memory.usage_in_bytes": "1500\n",
                "memory/job/memory.stat": "inactive_file 0\ntotal_inactive_file 300\ntotal_active_file 0\n",
            },
            800,
        ),
        ("0::/job\n", {"job/memory.max": "max\n", "job/memory.high": "700\n"}, 700),
        ("0::/job\n", {"job/memory.max": "600\n", "job/memory.high": "700\n"}, 600),
        ("3:cpu:/job\n", {"cpu/job/memory.max": "1000\n"}, math.inf),
        (None, {}, math.inf),
    ],
)
def test_a_job_has_the_memory_that_its_groups_leave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str | None, files: dict[str, str], expected: float
) -> None:
    put_into_groups(tmp_path, monkeypatch, groups, files)
    assert machine.memory_left() == expected
    assert 0 < free_gib() * GIB <= 0.8 * expected


BUILDS = {
    "cpu": "cuda: Optional[str] = None\nhip: Optional[str] = None\n",
    "cuda": "cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n",
    "hip": "cuda = None\nhip = '6.4.43482'\n",
}


@pytest.mark.skipif(sys.platform == "darwin", reason="there torch has one GPU, and no drivers to look for")
@pytest.mark.parametrize(
    ("build", "driver", "library", "shown", "expected"),
    [
        ("cuda", "nvidia", "there", None, True),
        ("cuda", "dxg", "there", "0,1", True),
        ("cuda", "nvidia", "absent", None, False),
        ("cuda", "dxg", "absent", None, False),
        ("cuda", "nvidia", "there", "", False),
        ("cuda", "nvidia", "there", "-1", False),
        ("cuda", "nvidia", "there", "NoDevFiles", False),
        ("cuda", "none", "there", None, False),
        ("cuda", "kfd", "there", None, False),
        ("cpu", "nvidia", "there", None, False),
        ("cpu", "kfd", "there", None, False),
        ("hip", "kfd", "absent", None, True),
        ("hip", "nvidia", "there", None, False),
    ],
)
def test_a_gpu_counts_where_torch_was_built_for_it_and_its_driver_is_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: str,
    driver: str,
    library: str,
    shown: str | None,
    expected: bool,
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{BUILDS[build]}")
    (tmp_path / driver).mkdir()
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(machine, "find_spec", lambda name: spec)
    monkeypatch.setattr(machine, "_NVIDIA", (tmp_path / "nvidia", tmp_path / "dxg"))
    monkeypatch.setattr(machine, "_AMD", tmp_path / "kfd")
    monkeypatch.setattr(machine, "_CUDA", {"there": find_library("c"), "absent": "libabsent.so.1"}[library])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert machine.has_gpu() == expected


@pytest.mark.parametrize(
    ("shown", "found", "expected"),
    [(None, 3, ["0", "1", "2"]), ("2,GPU-5e", 2, ["2", "GPU-5e"]), ("1,9,0", 1, ["1"]), (None, 0, [])],
)
def test_gpus_are_named_as_whoever_grants_them_does(
    monkeypatch: pytest.MonkeyPatch, shown: str | None, found: int, expected: list[str]
) -> None:
    """CUDA counts those before the first that is not there."""

    def count(place: Any) -> int:
        place._obj.value = found
        return 0

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda _: 0, cuDeviceGetCount=count))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert machine.cuda_devices() == expected


def test_what_torch_was_built_for_is_what_it_says_itself() -> None:
    assert ("cuda" in machine._torch_builds()) == (torch.version.cuda is not None)
    assert ("hip" in machine._torch_builds()) == (torch.version.hip is not None)


def test_a_command_s_user_who_has_no_name_goes_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(os, "getuid", lambda: 2_000_000_003)
    with pytest.raises(KeyError):
        getpass.getuser()
    monkeypatch.setattr(sys, "argv", ["fullfield", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert getpass.getuser() == machine.user_name() == "2000000003"
