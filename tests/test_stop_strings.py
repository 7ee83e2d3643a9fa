"""Stop strings: the text ends before the first complete one, and no part of it is emitted."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t_agents import ChatS2T
from s2t_agents.engine.stop_strings import StopStrings
from s2t_agents.errors import ConfigError

TEXTS = st.text(alphabet="abé ", max_size=30)
STOPS = st.lists(st.text(alphabet="abé ", min_size=1, max_size=4), max_size=3)


def split(text, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def run(stops, pieces):
    """Everything shown, and whether a stop ended it."""
    waiting, shown = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = waiting.push(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + waiting.flush(), False


def sum_of(chunks):
    first, *rest = chunks
    return sum(rest, first)


def first_completed(stops, text):
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@given(STOPS, TEXTS, st.lists(st.integers(0, 30), max_size=10))
def test_any_split_is_cut_where_find_says(stops, text, cuts):
    assert run(stops, split(text, cuts)) == first_completed(stops, text)


@given(st.text(alphabet="ab", min_size=1, max_size=4), TEXTS)
def test_one_stop_string_is_str_find(stop, text):
    shown, stopped = run([stop], list(text))
    at = text.find(stop)
    assert (shown, stopped) == ((text[:at], True) if at >= 0 else (text, False))


def test_a_possible_stop_is_held_and_only_that():
    waiting = StopStrings(["\nObservation:"])
    assert waiting.push("done\nObs") == ("done", False)
    assert waiting.push("tacle") == ("\nObstacle", False)


def test_after_a_stop_nothing_more_is_shown():
    waiting = StopStrings("END")
    assert waiting.push("x END y") == ("x ", True)
    assert waiting.push("more") == ("", True)
    assert waiting.flush() == ""
    assert waiting.stopped


@pytest.mark.parametrize("stops", [[""], ["ok", ""], [None]])
def test_an_empty_stop_string_is_refused(stops):
    with pytest.raises(ConfigError, match="cannot be waited for"):
        StopStrings(stops)


@pytest.mark.parametrize("drive", ["invoke", "stream"])
def test_nothing_is_generated_after_a_stop_string(drive):
    def answered(**settings):
        steps = []
        model = ChatS2T(max_tokens=40, on_step=lambda trace, step: steps.append(step), **settings)
        message = model.invoke("hello") if drive == "invoke" else sum_of(model.stream("hello"))
        return message, len(steps)

    whole, all_steps = answered()
    stop = whole.text[4:7]
    cut, steps = answered(stop=[stop])
    assert cut.text == whole.text.split(stop)[0]
    assert cut.usage_metadata["output_tokens"] == steps < all_steps
