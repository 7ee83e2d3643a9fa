"""Bars of long work: they say how fast it goes and how long it will take, also where a piece takes minutes."""

import io
import queue

from rich.console import Console

from s2t_agents.training.progress import TELL_S, DrawnBar, Told, ToldBar, bar, draw, progress_on, tell


def test_rate_and_time_left_are_shown_when_a_piece_takes_minutes():
    now = [0.0]
    shown = io.StringIO()
    progress = progress_on(Console(file=shown, force_terminal=True, width=120), lambda: now[0])
    bar = DrawnBar(progress, "collect", 1280)
    for _ in range(2):
        now[0] += 256.0
        bar.advance(128)
    with progress.console.capture() as captured:
        progress.console.print(progress.get_renderable())
    line = captured.get()
    assert "256/1280" in line
    assert "0.5/s" in line
    assert "0:34:08" in line  # 1024 items at half a second each


def test_a_bar_is_silent_where_nobody_looks():
    shown = io.StringIO()
    with progress_on(Console(file=shown, force_terminal=False)) as progress:
        DrawnBar(progress, "collect", 2).advance()
    assert shown.getvalue() == ""


def told(post: queue.SimpleQueue) -> list[Told]:
    found = []
    while not post.empty():
        found.append(post.get())
    return found


def test_a_process_of_a_crew_tells_how_far_it_is_now_and_then():
    now, post = [0.0], queue.SimpleQueue()
    bar = ToldBar(post, "train", 100, lambda: now[0])
    for _ in range(40):
        now[0] += TELL_S / 4
        bar.advance()
    bar.say("train  agreement 0.9")
    bar.close()
    news = told(post)
    assert [each.done for each in news] == [0, *range(4, 41, 4), 40, 40]
    assert (news[-2].what, news[-2].total, news[-1].total) == ("train  agreement 0.9", 100, None)


def test_who_is_told_to_tell_draws_nothing():
    post = queue.SimpleQueue()
    tell(post)
    try:
        with bar("read", 3) as line:
            line.advance()
    finally:
        tell(None)
    assert [(each.what, each.total) for each in told(post)] == [("read", 3), ("read", None)]


def test_the_lines_of_a_crews_processes_are_drawn_as_they_are_told():
    post, shown = queue.SimpleQueue(), io.StringIO()
    for each in (
        Told(1, "read", 0, 10), Told(2, "train", 0, 8), Told(1, "read", 10, None),
        Told(1, "train", 0, 6), Told(1, "train", 3, 6), Told(2, "train", 8, None), None,
    ):  # fmt: skip
        post.put(each)
    draw(post, Console(file=shown, force_terminal=True, width=120))
    last = shown.getvalue().rsplit("train", 1)[1]
    assert "3/6" in last
    assert "8/8" not in last  # over, and gone
