import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster import connect
from pipeline.origin import source_digest
from pipeline.settings import ClusterSettings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only there workers are forked")

COMMAND = """
import os
from pipeline.cluster import connect
from pipeline.settings import ClusterSettings
from pipeline.origin import source_digest

if __name__ == "__main__":
    with connect(ClusterSettings(workers=1)) as cluster:
        cluster.submit("parent", os.getppid)
        cluster.submit("code", source_digest)
        found = {outcome.key: outcome.value for outcome in cluster}
    print(found["parent"] == os.getpid(), found["code"])
"""


def test_workers_are_forked_with_this_code_in_a_folder_that_has_a_package_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND)
    other = tmp_path / "analysis" / "pipeline" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("raise SystemExit('another pipeline')")
    command = [sys.executable, tmp_path / "command.py"]
    done = subprocess.run(command, cwd=tmp_path / "analysis", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", source_digest()]
    assert done.stderr == ""


def test_workers_start_by_themselves_where_the_fork_server_has_no_room_for_its_socket(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND)
    long = tmp_path / ("t" * 100)
    long.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(long)}
    command = [sys.executable, tmp_path / "command.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", source_digest()]
    assert done.stderr == ""


def test_workers_have_the_environment_of_the_moment_in_which_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("one", "two"):
        monkeypatch.setenv("FULLFIELD_TEST", value)
        with connect(ClusterSettings(workers=1)) as cluster:
            cluster.submit("set", os.getenv, "FULLFIELD_TEST")
            cluster.submit("imports", os.getenv, "PYTHONSAFEPATH", "none")
            assert {outcome.key: outcome.value for outcome in cluster} == {"set": value, "imports": "none"}


def test_workers_import_no_library_that_their_tasks_may_not_need() -> None:
    with connect(ClusterSettings(workers=1)) as cluster:
        cluster.submit("imported", imported)
        (outcome,) = cluster
    assert "pipeline.finishing" in outcome.value
    assert {"torch", "monai", "mlflow"}.isdisjoint(outcome.value)


def imported() -> set[str]:
    return set(sys.modules)


HEEDING = ("import signal", "signal.signal(signal.SIGINT, signal.default_int_handler)")
"""What a shell starts in its background is told to ignore Ctrl-C."""


def test_ctrl_c_counts_while_the_fork_server_starts() -> None:
    lines = (
        *HEEDING,
        "import os",
        "from multiprocessing import forkserver",
        "from pipeline.forking import start_forking",
        "start = forkserver.ensure_running",
        "forkserver.ensure_running = lambda: (start(), os.killpg(0, signal.SIGINT), print('started', flush=True))",
        "start_forking({})",
        "print('not reached')",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "started\n")
    assert done.stderr.count("Traceback") == 1, "of the command, and not of the fork server"


@pytest.mark.parametrize("ending", ["pass", "raise OSError('no room')"])
def test_a_second_sigterm_lets_what_the_first_began_come_to_its_end(ending: str) -> None:
    lines = (
        "import signal",
        "from pipeline.forking import ended_as_by_ctrl_c",
        "with ended_as_by_ctrl_c():",
        "    try:",
        "        signal.raise_signal(signal.SIGTERM)",
        "    finally:",
        "        signal.raise_signal(signal.SIGTERM)",
        "        print('noted', flush=True)",
        f"        {ending}",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "noted\n")
    assert done.stderr == ("" if ending == "pass" else "OSError: no room\n")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", -signal.SIGINT), ("SIGTERM", 128 + signal.SIGTERM)])
def test_ctrl_c_and_sigterm_wait_until_workers_are_started(name: str, code: int) -> None:
    lines = (
        *HEEDING,
        "import os",
        "from pipeline.forking import ended_as_by_ctrl_c, uninterrupted",
        "with ended_as_by_ctrl_c():",
        "    with uninterrupted():",
        f"        os.kill(os.getpid(), signal.{name})",
        "        print('started', flush=True)",
        "    print('not reached')",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "started\n")
