"""``os.fork()`` while other threads generate, load and write: child and parent both continue."""

from __future__ import annotations

import ast
import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest

import s2t_agents
from s2t_agents.fork_safety import hold_while_forking, registered_locks

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
READING = """
def forking(batch):
    if not children:
        children.append(1)
        in_child(lambda: model.invoke(prompt).text == right)  # whose reading of this prompt ends in the parent
    return forward(batch)

prompt, children = QUESTION * 8, []
model = ChatS2T(max_tokens=6)
right = model.invoke(prompt).text
slm = model.engine.slm
slm.prefix_cache.clear()
forward, slm.backend.forward = slm.backend.forward, forking
assert model.invoke(prompt).text == right
assert children
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
IN_THE_MIDDLE_OF_BOOKING = """
from decimal import Decimal
from s2t_agents.budget import Budget, Charge, SQLiteStore, SystemClock

class Slow(SystemClock):
    def monotonic(self):  # asked inside a transaction
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            forking.wait()
            time.sleep(.3)  # the fork takes its locks meanwhile
        return super().monotonic()

inside, forking = threading.Event(), threading.Event()
budget = Budget(escalations=9, store=SQLiteStore(tempfile.mkdtemp() + "/budget.db", clock=Slow()))
thread = threading.Thread(target=lambda: budget.reserve(Charge(Decimal(0))).settle(Charge(Decimal(0))))
thread.start()
inside.wait()
os.register_at_fork(before=forking.set)
in_child(lambda: budget.reserve(Charge(Decimal(0))).settle(Charge(Decimal(0))) is None)
thread.join()
assert budget.state().spent["escalations"] == 2
"""
GRADING = """
from s2t_agents.training.equivalence import MathEquivalence
from s2t_agents.training.math_judge import shared_judge

def equal():
    return math.vote("item", "\\\\boxed{1/2}") == first and shared_judge().equal("1/3", "2/6")

math = MathEquivalence()
first = math.vote("item", "\\\\boxed{0.5}")
assert shared_judge().equal("1/2", "2/4")
worker = shared_judge().worker_pid
over, threads = busily(lambda: shared_judge().equal("2/7", "4/14"), 1)
for number in range(3):
    in_child(lambda: equal() and shared_judge().worker_pid != worker)
over.set()
for thread in threads:
    thread.join(30)
assert equal() and shared_judge().worker_pid == worker
"""
FILES = """
from decimal import Decimal
from pathlib import Path
from s2t_agents.budget import Charge, SQLiteStore
from s2t_agents.errors import S2TError
from s2t_agents.ledger import GenerationRecord

def refused(use):
    try:
        use()
    except S2TError as error:
        return "removed or replaced" in str(error)

folder, charge = Path(tempfile.mkdtemp()), Charge(Decimal("0.1"))
store, ledger = SQLiteStore(folder / "budget.db"), Ledger.open(folder / "costs.db")
budget = Budget(usd=1, store=store)
names = [file.name for file in folder.iterdir()]
for name in names:
    (folder / name).rename(folder / f"moved-{name}")
in_child(lambda: refused(lambda: budget.reserve(charge)))
in_child(lambda: refused(lambda: ledger.record(GenerationRecord())))
assert not [name for name in names if (folder / name).exists()]
for name in names:
    (folder / f"moved-{name}").rename(folder / name)
hold = budget.reserve(charge)
in_child(lambda: store.close() is None and budget.reserve(charge).settle(charge) is None)
in_child(lambda: ledger.record(GenerationRecord()) is None and ledger.close() is None)
hold.settle(charge)
ledger.record(GenerationRecord())
assert budget.state().spent["usd"] == Decimal("0.2") and ledger.total().generations == 2
"""
PROGRAMS = {
    "its files": FILES,
    "in the middle of booking": IN_THE_MIDDLE_OF_BOOKING,
    "grading": GRADING,
    "a library's call": LIBRARY,
    "in the middle of reading": READING,
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


FREE_OTHERWISE = {
    ("fork_safety.py", "_lock"): "made anew in the child",
    ("budget/memory_store.py", "_lock"): "a child is refused before it takes it",
    ("backends/torch/cuda/cuda_graph.py", "CAPTURING"): "no child of a process that uses CUDA can use CUDA",
    ("endpoints/event_loop.py", "_lock"): "made anew in the child, with the loop",
    ("scheduling/computing.py", "_never"): "taken as the interpreter ends",
    ("scheduling/requests.py", "_pending"): "one request's, and the child has none of another thread's",
    ("training/equivalence.py", "_lock"): "made anew in the child",
}


def locks_of(module: ast.Module) -> Iterator[str]:
    """The names that locks get, as attributes or in the module; a condition over another lock is that lock."""
    for node in ast.walk(module):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            pairs = [
                pair
                for target in targets
                for pair in (
                    zip(target.elts, node.value.elts, strict=True)
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    else [(target, node.value)]
                )
            ]
            for target, value in pairs:
                shared = isinstance(value, ast.Call) and ast.unparse(value.func) == "threading.Condition" and value.args
                kinds = {ast.unparse(each) for each in ast.walk(value) if isinstance(each, ast.Attribute)}
                if not shared and kinds & {"threading.Lock", "threading.RLock", "threading.Condition"}:
                    yield target.attr if isinstance(target, ast.Attribute) else ast.unparse(target)


def test_every_lock_of_the_package_is_free_in_a_child() -> None:
    package = Path(s2t_agents.__file__).parent
    found, held = set(), set()
    for path in package.rglob("*.py"):
        module, name = ast.parse(path.read_text()), path.relative_to(package).as_posix()
        found |= {(name, lock) for lock in locks_of(module)}
        held |= {
            (name, ast.literal_eval(call.args[1]))
            for call in ast.walk(module)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "hold_while_forking"
        }
    assert len(found) > 20
    assert found - held == set(FREE_OTHERWISE)


def test_threads_that_register_locks_at_once_lose_none_and_what_is_gone_is_forgotten() -> None:
    class Owner:
        def __init__(self, order: int) -> None:
            self.lock = threading.Lock()
            hold_while_forking(self, "lock", order)

    kept: list[Owner] = []
    before = len(list(registered_locks()))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: kept.extend(Owner(at % 5) for at in range(300))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    owners = {id(owner) for owner, _ in registered_locks()}
    assert all(id(each) in owners for each in kept)
    assert len(kept) == 8 * 300
    kept.clear()
    gc.collect()
    assert len(list(registered_locks())) <= before
