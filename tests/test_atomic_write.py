"""Atomic writes with concurrent writers and killed ones; one run per folder."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from s2t_agents import atomic_write as writing
from s2t_agents.atomic_write import sole_run, write_whole
from s2t_agents.errors import FolderInUse, S2TError

SIZE = 200_000


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_many_writers_of_one_file_never_show_half_of_it(tmp_path: Path) -> None:
    path, over = tmp_path / "whole.bin", threading.Event()
    failed: list[BaseException] = []

    def write(letter: bytes) -> None:
        try:
            for _ in range(40):
                write_whole(path, letter * SIZE)
        except Exception as error:  # noqa: BLE001 - told below
            failed.append(error)

    def watch() -> None:
        while not over.is_set():
            if path.exists() and len(set(data := path.read_bytes())) + (len(data) != SIZE) != 1:
                failed.append(AssertionError("half a file"))

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    watcher = threading.Thread(target=watch)
    for thread in (*writers, watcher):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    watcher.join()
    assert failed == []
    assert names(tmp_path) == ["whole.bin"]


KILLED = """
import os, sys
from pathlib import Path
from s2t_agents import atomic_write as writing

class Full(bytes):
    pass

os.fsync = lambda number: os.kill(os.getpid(), 9)
writing.write_whole(Path(sys.argv[1]), b"half")
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_what_a_killed_writer_left_goes_with_the_next_and_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "whole.bin"
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=60)
        assert killed.returncode == -signal.SIGKILL
        assert not path.exists()
        assert len(names(tmp_path)) == 1  # the second took the first one's away
    write_whole(tmp_path / "another.bin", b"x")  # not of this file
    assert len(names(tmp_path)) == 2
    write_whole(path, b"whole")
    assert names(tmp_path) == ["another.bin", "whole.bin"]


def test_a_failed_write_leaves_what_stood_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "whole.bin"
    write_whole(path, b"before")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(number: int, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(writing.os, "fsync", fail)
        with pytest.raises((S2TError, KeyboardInterrupt)):
            write_whole(path, b"after")
        assert path.read_bytes() == b"before"
        assert names(tmp_path) == ["whole.bin"]


def test_a_file_has_the_rights_that_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_whole(tmp_path / "whole.bin", b"x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "whole.bin")}
    assert len(modes) == 1


def test_a_second_run_is_refused_by_name_and_the_first_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    code = """
import sys
from pathlib import Path
from s2t_agents.errors import FolderInUse
from s2t_agents.atomic_write import sole_run
try:
    with sole_run(Path(sys.argv[1])):
        pass
except FolderInUse as error:
    print(error)
"""
    with sole_run(folder):
        write_whole(folder / "work", b"x")
        other = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
        assert f"another run, pid {os.getpid()}, is at work in {folder}" in other.stdout
        with pytest.raises(FolderInUse), sole_run(folder):
            pass
        with sole_run(tmp_path / "runs"):  # a folder around it is another one
            pass
    assert names(folder) == ["work"]
    with sole_run(folder):  # free again
        pass


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_run_keeps_nobody_out(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from s2t_agents.atomic_write import sole_run
with sole_run(Path(sys.argv[1])):
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    with sole_run(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_run_that_made_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(LookupError), sole_run(tmp_path / "new"):
        raise LookupError
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(S2TError, match="cannot be written"), sole_run(tmp_path / "file"):
        pass


def test_of_many_runs_at_once_one_is_at_work(tmp_path: Path) -> None:
    inside, most, refused = [0], [0], [0]

    def run() -> None:
        for _ in range(100):
            try:
                with sole_run(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except FolderInUse:
                refused[0] += 1

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
