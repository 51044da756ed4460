"""What a process may use of this machine: processors, a GPU, memory that its allocator keeps, and a folder for its cache;
and by which name its user goes.
"""

from __future__ import annotations

import ctypes
import getpass
import math
import os
import re
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir, mkdtemp

UNBOUND = {"OMP_PROC_BIND": "false"}
"""Environment of a worker, whatever this process has: told to bind threads, all would bind theirs to the same processors."""

_KEEP_BYTES = 1 << 34  # memory that the allocator may keep instead of giving it back
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>
_TOP_PAD_BYTES = 1 << 26
_NVIDIA = (Path("/proc/driver/nvidia/gpus"), Path("/dev/dxg"))  # its driver's, and what Linux in Windows has for every GPU
_CUDA = "libcuda.so.1"  # comes with a driver, and into a container only where that is given a GPU
_HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES; the last is what Slurm sets for jobs without a GPU
_MEMORY_LIMITS = (  # of a control group, and what of it is used; at the first, a group is slowed down until it hardly moves
    ("memory.high", "memory.current"),
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # the limits of Linux, and whose are this process's
_AMD = Path("/dev/kfd")  # there for every graphics of theirs, whether torch can use it or not


def cores() -> int:
    """Number of processors that this process may use: no more than it is granted the time of, as a container is."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(present, _granted()))


def _granted() -> float:
    """Processors whose time the control groups that this process is in grant it; infinity where none sets a limit."""
    return min(map(_quota, _groups("cpu")), default=math.inf)


def memory_left() -> float:
    """Bytes that the control groups that this process is in leave it, as a job's may; infinity where none sets a limit."""
    return min(map(_unused, _groups("memory")), default=math.inf)


def _groups(controller: str) -> set[Path]:
    """Folders of the control groups that this process is in, as far as they bound what `controller` hands out."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return set()
    folders = set[Path]()
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers or controller in controllers.split(","):  # of version 2, which names none, or of version 1
            top, own = _GROUPS / controller if controllers else _GROUPS, Path(path.lstrip("/"))
            folders |= {top / group for group in (own, *own.parents)}  # a group has no more than those that it is in
    return folders


def _quota(folder: Path) -> float:
    """Processors whose time a control group grants to all that is in it; infinity where it sets no limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # the latter for `max`
            quota, period = map(int, " ".join((folder / name).read_text(encoding="utf-8") for name in names).split())
            if quota > 0:
                return quota / period
    return math.inf


def _unused(folder: Path) -> float:
    """Bytes that a control group still has for what is in it, those of cached files too; infinity where it sets no limit."""
    left = math.inf
    for limit, used in _MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # the latter for `max`
            room = int((folder / limit).read_text(encoding="utf-8"))
            with suppress(OSError, ValueError):  # not every kernel tells what is used
                room -= int((folder / used).read_text(encoding="utf-8"))
                room += _cached(folder)
            left = min(left, room)
    return left


def _cached(folder: Path) -> int:
    """Bytes of files that a control group holds and would give back; of version 1 those of groups within it, too."""
    told = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    return sum(int(told.get(f"total_{name}", told.get(name, 0))) for name in ("active_file", "inactive_file"))


def threads() -> int:
    """Number of threads that this process's work may use: what OMP_NUM_THREADS grants, as for torch, else every core."""
    granted = os.environ.get("OMP_NUM_THREADS", "")
    return int(granted) if granted.isdecimal() and int(granted) else cores()


def has_gpu() -> bool:
    """Whether torch may find a GPU here: one that it was built for. Asking torch would take a second of every command."""
    if sys.platform == "darwin":
        return True
    built, shown = _torch_builds(), os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    nvidia = "cuda" in built and shown not in _HIDDEN and any(place.exists() for place in _NVIDIA) and _loads(_CUDA)
    return nvidia or "hip" in built and _AMD.exists()


def cuda_devices() -> list[str]:
    """The GPUs that CUDA finds here, as CUDA_VISIBLE_DEVICES names them; none where torch does not use it.

    CUDA itself is asked, which alone knows what that variable, a container and a batch system leave of them.
    """
    if sys.platform == "darwin" or not has_gpu() or not _loads(_CUDA):
        return []
    driver, count = ctypes.CDLL(_CUDA), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(count.value)] if shown is None else shown.split(",")
    return names[: count.value]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _torch_builds() -> list[str]:
    """Of `cuda` and `hip` those that torch was built with, as its version.py says, which is read and not imported."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return []
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return []
    return re.findall(r"^(cuda|hip)\b[^=\n]*=\s*['\"]", text, re.MULTILINE)


def keep_memory() -> None:
    """Let this process's allocator keep freed memory for the next activation. Without effect where there is no glibc.

    Where its environment has settled that, as `worker_environment` does, it stays so.
    """
    if sys.platform != "linux" or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in (
            (_M_ARENA_MAX, 1),
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_TOP_PAD, _TOP_PAD_BYTES),
        ):
            libc.mallopt(parameter, value)


def release_memory() -> None:
    """Give the memory that is kept free back to the kernel: for when work of another kind follows."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def worker_environment(threads: int) -> dict[str, str]:
    """Environment of a worker process, in place before its first allocation."""
    # Without tcache the few bytes that alignment cuts off an activation join it again when it is freed: its gap is then
    # large enough for the next one of its size. The heap of a small FCN grows by a tenth less, in no more time.
    tunables = {"mmap_max": 0, "trim_threshold": _KEEP_BYTES, "top_pad": _TOP_PAD_BYTES, "arena_max": 1, "tcache_count": 0}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **{name: str(threads) for name in names},
        **UNBOUND,
        "MALLOC_TRIM_THRESHOLD_": str(_KEEP_BYTES),
        "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in tunables.items()),
    }


def user_name() -> str:
    """The user's name; the number of one who has none, as a container's need not."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def settle_user_name() -> None:
    """Have every library find it, in this process and in those that it starts: some, as MONAI, fail where there is none."""
    os.environ["LOGNAME"] = user_name()


def cache_folder() -> Path:
    """The folder for what can be made again; where it may not be written, this user's own among temporary files."""
    if usual := _usual_cache():
        with suppress(OSError):
            usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK):
            return usual
    temporary = Path(gettempdir()) / f"fullfield-{os.getuid()}"
    with suppress(OSError):
        temporary.mkdir(mode=0o700, exist_ok=True)
    own = temporary.is_dir() and temporary.stat().st_uid == os.getuid()
    return temporary if own else usual or Path(mkdtemp(prefix="fullfield-"))


def _usual_cache() -> Path | None:
    """Where the desktop standard has it; None for a user without a name and a home, as containers have."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(chosen) if chosen else Path.home() / ".cache") / "fullfield"
    except RuntimeError:
        return None
