"""``os.fork()`` while other threads generate, load and write: child and parent both continue."""

from __future__ import annotations

import os

import forked
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

START = """
import asyncio, os, signal, sys, tempfile, threading, time
import torch
from s2t_agents import Budget, ChatS2T, Escalation, Ledger, LocalLLM
from s2t_agents.scheduling.admission import Concurrency
from s2t_agents.triggers import always, when

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(40)
        try:
            os._exit(0 if work() else 5)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(6)
    status = os.waitpid(child, 0)[1]
    assert status == 0, status

def busily(work, many=3):
    def for_ever():
        while not over.is_set():
            work()
    over = threading.Event()
    threads = [threading.Thread(target=for_ever, daemon=True) for _ in range(many)]
    for thread in threads:
        thread.start()
    time.sleep(.3)
    return over, threads

QUESTION = "Ann has 12 shells and finds 22 more. How many are there now?"
"""
BUSY = """
ledger = Ledger.open(tempfile.mkdtemp() + "/costs.jsonl")
limits = Concurrency(running=3, waiting=9, wait_s=20)
model = ChatS2T(selector="s2t-demo", max_tokens=8, ledger=ledger, concurrency=limits)
right = model.invoke(QUESTION).text
other = model.invoke("Bob has 18 shells.").text
over, threads = busily(lambda: model.invoke("Bob has 18 shells."))
for number in range(4):
    in_child(lambda: model.invoke(QUESTION).text == right)
    in_child(lambda: asyncio.run(model.ainvoke(QUESTION)).text == right)
over.set()
for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
assert model.invoke("Bob has 18 shells.").text == other
streams = [model.stream(QUESTION) for _ in range(3)]
assert all([next(stream) for stream in streams])  # all three slots are free
assert len(ledger.records()) > 10
"""
ASKING = """
model = ChatS2T(escalation=Escalation(LocalLLM("s2t-demo-llm"), margin=1.0), trigger=when(lambda _: True), max_tokens=6)
right = model.invoke(QUESTION).text
over, threads = busily(lambda: model.invoke("Bob has 18 shells."), 2)
for number in range(3):
    in_child(lambda: model.invoke(QUESTION).text == right)
over.set()
for thread in threads:
    thread.join(30)
"""
TWO_THREADS = """
torch.set_num_threads(2)
model = ChatS2T(max_tokens=6)
right = model.invoke(QUESTION).text
over, threads = busily(lambda: model.invoke("Bob has 18 shells."), 2)
for number in range(3):
    in_child(lambda: model.invoke(QUESTION).text == right)
over.set()
for thread in threads:
    thread.join(30)
"""
LOADING = """
right = ChatS2T(max_tokens=6).invoke(QUESTION).text
over, threads = busily(lambda: ChatS2T(max_tokens=2, selector="s2t-demo", device="cpu").invoke("hi"), 2)
for number in range(4):
    in_child(lambda: ChatS2T(max_tokens=6).invoke(QUESTION).text == right)
over.set()
for thread in threads:
    thread.join(30)
"""
IN_THE_MIDDLE_OF_LOADING = """
from s2t_agents.chat import runtime

def slow(*args):
    inside.set()
    forking.wait()
    time.sleep(.3)  # the fork takes its locks meanwhile
    return load(*args)

inside, forking, load = threading.Event(), threading.Event(), runtime.load_selector
right = ChatS2T(max_tokens=6).invoke(QUESTION).text
runtime.load_selector = slow
thread = threading.Thread(target=lambda: ChatS2T(max_tokens=2, selector="s2t-demo").invoke("hi"))
thread.start()
inside.wait()
os.register_at_fork(before=forking.set)
started = time.monotonic()
in_child(lambda: ChatS2T(max_tokens=6).invoke(QUESTION).text == right)
assert time.monotonic() - started < 30, "the fork and the thread have waited for each other"
thread.join()
"""
SUSPENDED = """
model = ChatS2T(max_tokens=20, concurrency=Concurrency(running=1, waiting=0))
right = model.invoke(QUESTION).text
stream = model.stream(QUESTION)
begun = next(stream).text

def work():
    ok = model.invoke(QUESTION).text == right  # the parent's stream holds no slot here
    stream.close()
    return ok and model.invoke(QUESTION).text == right

in_child(work)
assert begun + "".join(chunk.text for chunk in stream) == right
assert model.invoke(QUESTION).text == right  # the slot is free
"""
WITHIN = """
def on_step(trace, step):
    if not children:
        children.append(1)
        in_child(lambda: model.model_copy(update={"on_step": None}).invoke(QUESTION).text == right)

children = [1]
model = ChatS2T(max_tokens=6, on_step=on_step)
right = model.invoke(QUESTION).text
children.clear()
assert model.invoke(QUESTION).text == right
"""
TWO_FORKS_AT_ONCE = """
model = ChatS2T(max_tokens=6)
right = model.invoke(QUESTION).text
over, threads = busily(lambda: model.invoke("Bob has 18 shells."), 2)
wrong = []

def forks():
    try:
        for number in range(4):
            in_child(lambda: model.invoke(QUESTION).text == right)
    except AssertionError as error:
        wrong.append(error)

forking = [threading.Thread(target=forks) for _ in range(3)]
for thread in forking:
    thread.start()
for thread in forking:
    thread.join()
over.set()
for thread in threads:
    thread.join(30)
assert not wrong, wrong
"""
LIBRARY = """
from s2t_agents.fork_safety import delay_fork

def call():
    with delay_fork:  # as every call into llguidance and tokenizers
        inside.set()
        time.sleep(.5)
        done.append(1)

inside, done = threading.Event(), []
model = ChatS2T(max_tokens=6)
right = model.invoke(QUESTION).text
thread = threading.Thread(target=call)
thread.start()
inside.wait()
in_child(lambda: done == [1] and model.invoke(QUESTION).text == right)
thread.join()
assert model.invoke(QUESTION).text == right
"""
PROGRAMS = {
    "a library's call": LIBRARY,
    "two forks at once": TWO_FORKS_AT_ONCE,
    "busy": BUSY,
    "asking": ASKING,
    "two threads": TWO_THREADS,
    "loading": LOADING,
    "in the middle of loading": IN_THE_MIDDLE_OF_LOADING,
    "suspended": SUSPENDED,
    "within": WITHIN,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_child_answers_and_the_parent_goes_on(name: str) -> None:
    done = forked.run("-c", START + PROGRAMS[name])
    assert done.returncode == 0, done.stderr


def test_a_lock_that_stays_taken_is_new_in_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
from s2t_agents import fork_safety as forks
forks.MAX_WAIT_S = 0.2

class Holder:
    def __init__(self):
        self.lock = threading.Lock()
        forks.hold_while_forking(self, "lock")

holder = Holder()
taken = threading.Event()
threading.Thread(target=lambda: (holder.lock.acquire(), taken.set(), time.sleep(60)), daemon=True).start()
taken.wait()
in_child(lambda: holder.lock.acquire(timeout=1))
assert not holder.lock.acquire(blocking=False)
os._exit(0)
"""
    assert forked.run("-c", START + program).returncode == 0
