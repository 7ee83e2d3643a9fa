"""Independent pieces of work in a few processes."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import torch

from s2t_agents.errors import S2TError
from s2t_agents.training.crew import Crew


def where(piece: int) -> tuple[int, int, int]:
    return piece, os.getpid(), torch.get_num_threads()


def refuses_three(piece: int) -> int:
    if piece == 3:
        raise S2TError("three is one too many.", hint="Give fewer.")
    return piece


def dies(piece: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_crew_of_one_works_here_one_piece_after_the_other():
    with Crew() as crew:
        assert list(crew.each(where, [5, 6])) == [(at, os.getpid(), torch.get_num_threads()) for at in (5, 6)]


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


@pytest.mark.slow
def test_every_piece_is_done_once_elsewhere_on_a_share_of_the_threads(crew):
    done = [*crew.each(where, range(6)), *crew.each(where, range(6, 9))]
    pieces, processes, threads = zip(*done, strict=True)
    assert sorted(pieces) == list(range(9))
    assert os.getpid() not in processes
    assert len(set(processes)) <= 2
    assert set(threads) == {1}


@pytest.mark.slow
def test_an_error_arrives_whole_and_ends_the_work(crew):
    with pytest.raises(S2TError, match="three is one too many") as caught:
        list(crew.each(refuses_three, [1, 2, 3, *range(4, 200)]))
    assert caught.value.hint == "Give fewer."
    assert list(crew.each(refuses_three, [7])) == [7]


def fails_beside_a_long_one(folder: str) -> None:
    (mine := Path(folder, str(os.getpid()))).touch()
    if min(Path(folder).iterdir()) == mine:
        while len(list(Path(folder).iterdir())) < 2:
            time.sleep(0.02)
        raise S2TError("no.")
    time.sleep(600)


@pytest.mark.slow
def test_an_error_ends_what_the_others_are_in_the_middle_of(tmp_path):
    with pytest.raises(S2TError, match="no"), Crew(2) as crew:
        list(crew.each(fails_beside_a_long_one, [str(tmp_path)] * 2))
    assert not any(alive(int(file.name)) for file in tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_that_dies_is_named_instead_of_waited_for():
    with Crew(2) as crew, pytest.raises(S2TError, match="one of 2 processes died") as caught:
        list(crew.each(dies, [1, 2]))
    assert "Run it again" in caught.value.hint


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_process_that_is_killed_ends_the_block_and_the_others(tmp_path):
    with pytest.raises(S2TError, match="one of 2 processes died"), Crew(2) as crew:
        list(crew.each(is_killed_beside_a_long_one, [str(tmp_path)] * 2))
    assert not any(alive(int(file.name)) for file in tmp_path.iterdir())


def is_killed_beside_a_long_one(folder: str) -> None:
    (mine := Path(folder, str(os.getpid()))).touch()
    if min(Path(folder).iterdir()) == mine:
        while len(list(Path(folder).iterdir())) < 2:
            time.sleep(0.02)
        time.sleep(1)  # everything that waits in this process waits by now
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


HANGING = """
import sys, time
sys.path.insert(0, {tests!r})
from s2t_agents.training.crew import Crew
from test_crew import waits
if __name__ == "__main__":
    for _ in Crew(2).each(waits, [{folder!r}, {folder!r}]):
        pass
"""


def waits(folder: str) -> None:
    open(f"{folder}/{os.getpid()}", "w").close()
    time.sleep(600)


@pytest.mark.slow
def test_its_processes_do_not_outlive_a_parent_that_was_killed(tmp_path):
    script = HANGING.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    parent = forked.start("-c", script)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(file.name) for file in tmp_path.iterdir()]
    parent.kill()
    parent.join()
    assert len(children) == 2
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, children))


def alive(process: int) -> bool:
    """Whether it runs; one that has ended and was not waited for (its parent is gone) does not."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
