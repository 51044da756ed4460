import errno
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import refusal
from pipeline.files import file_digest, keep_in_cache, locked, new_folder, replacing, write_text
from pipeline.shards import ShardedArray

HOLD = """
import pathlib, sys, time
from pipeline.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_nothing_is_lost_where_many_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_text(path, "")

    def write(row: int) -> None:
        with locked(path):
            found = path.read_text()
            time.sleep(0.002)  # long enough for the others to write, if they could
            write_text(path, f"{found}{row}\n")

    writers = [threading.Thread(target=write, args=(row,)) for row in range(20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(map(int, path.read_text().split())) == list(range(20))


def test_a_file_that_many_write_at_once_is_that_of_one_of_them(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.with_name("file.txt.partial").write_text("left by one that was killed")
    contents, failed = [f"{number}\n" * 20_000 for number in range(4)], list[Exception]()

    def write(content: str) -> None:
        try:
            for _ in range(50):
                write_text(path, content)
                assert path.read_text() in contents
        except Exception as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    assert [found.name for found in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_that_many_make_at_once_is_that_of_one_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "left by one that was killed").touch()

    def make(number: int) -> bool:
        with suppress(OSError), new_folder(folder) as partial:
            partial.mkdir()
            for name in "abc":
                (partial / name).write_text(str(number))
                assert not folder.exists() or len(list(folder.iterdir())) == 3
            return True
        return False

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(make, range(4)))
    assert sum(made) == 1
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys("abc", str(made.index(True)))
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other") as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [folder]


def test_shared_locks_wait_only_for_those_that_are_not(tmp_path: Path) -> None:
    path, entered = tmp_path / "slide", threading.Event()

    def work_alone() -> None:
        with locked(path):
            entered.set()

    alone = threading.Thread(target=work_alone)
    with locked(path, shared=True), locked(path, shared=True):
        alone.start()
        assert not entered.wait(0.1)
    alone.join()
    assert entered.is_set()


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "slide")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGKILL)
    with locked(tmp_path / "slide"):
        holder.communicate()


def test_without_locks_each_writer_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("pipeline.files.fcntl.flock", refuse)
    path = tmp_path / "file.txt"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_the_digest_of_a_file_is_that_of_its_content_and_costs_one_reading(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    contents = [letter * 1000 for letter in (b"a", b"b", b"c")]
    wanted = [hashlib.sha256(content).hexdigest() for content in contents]
    path.write_bytes(contents[0])
    os.utime(path, ns=(0, 1))
    assert file_digest(path) == wanted[0]
    path.write_bytes(contents[1])
    os.utime(path, ns=(0, 1))
    for number in range(5000):  # as many as a large cohort has
        (tmp_path / str(number)).touch()
        file_digest(tmp_path / str(number))
    assert file_digest(path) == wanted[0]  # nothing that is told without reading has changed
    os.utime(path, ns=(0, 2))
    assert file_digest(path) == wanted[1]
    other.write_bytes(contents[2])
    os.utime(other, ns=(0, 2))
    other.replace(path)
    assert file_digest(path) == wanted[2]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file_digest(path)


def test_a_cache_keeps_what_was_used_last_or_today(tmp_path: Path) -> None:
    def made(name: str, days_ago: float) -> Path:
        folder = tmp_path / "cache" / name
        folder.mkdir(parents=True)
        (folder / "network.xml").touch()
        os.utime(folder, (time.time() - days_ago * 86400,) * 2)
        return folder

    old = [made(f"old {day}", day) for day in range(2, 22)]
    recent = [made(f"recent {number}", number / 30) for number in range(20)]
    assert keep_in_cache(old[-1]) == old[-1] and old[0].exists()  # nothing is new
    new = keep_in_cache(tmp_path / "cache" / "new")
    assert not new.exists()
    assert set((tmp_path / "cache").iterdir()) == {*recent, old[-1]}
    for folder in recent:
        os.utime(folder, (0, 0))
    keep_in_cache(recent[7])
    keep_in_cache(new)
    left = set((tmp_path / "cache").iterdir())
    assert len(left) == 16 and {recent[7], old[-1]} < left


def test_who_makes_room_takes_nothing_from_who_has_just_looked(tmp_path: Path) -> None:
    folders = [tmp_path / "cache" / str(number) for number in range(40)]
    for folder in folders:
        folder.mkdir(parents=True)
        os.utime(folder, (0, 0))

    def look(folder: Path) -> bool:
        keep_in_cache(folder.with_name(f"{folder.name} anew"))
        return keep_in_cache(folder).exists()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(look, folders))
    assert [folder.exists() for folder in folders] == found
    assert 0 < sum(found) < 40


def test_a_write_that_the_system_cuts_short_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    """As a full disk does; the system itself names none."""
    array, noise = ShardedArray(tmp_path / "array", (64, 64), 64, 64, 0), np.random.default_rng(0).bytes(64 * 64)
    chunk = array.encode(np.frombuffer(noise, np.uint8).reshape(64, 64))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writes = {tmp_path / "text": partial(write_text, tmp_path / "text", 5000 * "x")}
    writes[array.path((0, 0))] = partial(array.store, (0, 0), {(0, 0): chunk})
    for path, write in writes.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.filename == str(path)
        assert list(path.parent.glob("*.partial")) == []


def test_a_copy_that_the_system_cuts_short_names_where_to(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(bytes(5000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            shutil.copy2(tmp_path / "from", tmp_path / "to")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    expected = f"{tmp_path / 'to'}: found 'File too large'; expected a place to read and write. Make room or give access."
    assert refusal(caught.value, "a file") == expected


@pytest.mark.parametrize(
    ("made", "asked", "told"),
    [
        ("file", "file/a/b", "{}/file: found a file; expected a folder"),
        ("file", "file", "{}/file: found a file; expected a folder"),
        ("folder/a", "folder", "{}/folder: found a folder; expected a file"),
    ],
)
def test_a_file_for_a_folder_or_the_reverse_is_told_by_its_own_name(
    tmp_path: Path, made: str, asked: str, told: str
) -> None:
    (tmp_path / made).parent.mkdir(exist_ok=True)
    (tmp_path / made).touch()
    for use in (Path.read_text, partial(write_text, text="x")) if asked != "file" else (Path.mkdir,):
        with pytest.raises(OSError, match=r"directory|exists") as caught:
            use(tmp_path / asked)
        assert str(refusal(caught.value, "a file")).startswith(told.format(tmp_path))
