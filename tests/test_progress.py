"""Bars of long work: they say how fast it goes and how long it will take, also where a piece takes minutes."""

import io
import queue
import time

from rich.console import Console

from s2t_agents.training.progress import (
    TELL_S,
    DrawnBar,
    LineBar,
    Told,
    ToldBar,
    bar,
    draw,
    lines_of,
    progress_on,
    tell,
)


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


def test_a_log_has_a_line_a_minute_with_what_is_left():
    now, lines = [0.0], []
    bar = LineBar("collect", 1280, lines.append, lambda: now[0])
    bar.line()
    for _ in range(2):
        now[0] += 256.0
        bar.advance(128)
    bar.line()
    bar.say("collect more")
    bar.line()
    assert lines[0] == "collect  0/1,280  0:00:00 so far, time left unknown"
    assert lines[1] == "collect  256/1,280  0:08:32 so far, 0:34:08 left"
    assert lines[2].startswith("collect more  256/1,280")


def test_what_an_earlier_run_did_does_not_count_as_speed():
    now, lines = [0.0], []
    bar = LineBar("train", 100, lines.append, lambda: now[0])
    bar.advance(80)
    bar.line()
    now[0] += 60.0
    bar.advance(10)
    bar.line()
    assert lines == ["train  80/100  0:00:00 so far, time left unknown", "train  90/100  0:01:00 so far, 0:01:00 left"]


def test_lines_come_while_one_piece_takes_long_and_stop_with_the_work():
    lines = queue.SimpleQueue()
    with lines_of(LineBar("label", 1, lines.put), every=0.01):
        assert [lines.get(timeout=10) for _ in range(3)]
    while not lines.empty():
        lines.get()
    time.sleep(0.05)
    assert lines.empty()


def test_short_work_leaves_no_line_in_a_log(capsys):
    with bar("read", 3) as line:
        line.advance()
    assert capsys.readouterr().err == ""


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
