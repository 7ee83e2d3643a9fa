"""However a stream is left, its record is there when the event loop has ended, and nobody complains."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import forked
import pytest
from ending import ended

from s2t_agents import Ledger
from s2t_agents.scheduling.computing import Computing

WAYS = {
    "break": "async for _ in model.astream('hello'): break",
    "events": """
        async for event in model.astream_events('hello', version='v2'):
            if event['event'].endswith('stream'): break
    """,
    "bound": "async for _ in model.bind(stop=['zzz']).astream('hello'): break",
    "an error": """
        try:
            async for _ in model.astream('hello'): raise KeyError
        except KeyError: pass
    """,
    "cancelled": """
        task = asyncio.create_task(drain(model)); await asyncio.sleep(.05); task.cancel()
        try: await task
        except asyncio.CancelledError: pass
    """,
    "not awaited": "asyncio.create_task(drain(model)); await asyncio.sleep(.05)",
    "timeout": """
        try: await asyncio.wait_for(model.ainvoke('hello'), .05)
        except TimeoutError: pass
    """,
    "task group": """
        async def fail():
            await asyncio.sleep(.05)
            raise KeyError
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(model.ainvoke('hello')); group.create_task(fail())
        except* KeyError: pass
    """,
    "kept": "kept.append(model.astream('hello')); await anext(kept[0])",
    "in a cycle": "cycle = [model.astream('hello')]; cycle.append(cycle); await anext(cycle[0])",
}
PROGRAM = """
import asyncio, gc, logging, sys
from s2t_agents import ChatS2T, Ledger
from s2t_agents.testing import tiny_model

logging.basicConfig(level=logging.WARNING)
sys.unraisablehook = lambda told: print("unraisable", told.exc_value, told.object, file=sys.stderr)
model = ChatS2T(model=tiny_model(max_position_embeddings=4096, seed=8), max_tokens=500)
kept = []

async def drain(model):
    async for _ in model.astream('hello'): pass

async def leave(model):
{way}

for _ in range(3):
    ledger = Ledger()
    asyncio.run(leave(model.model_copy(update={{"ledger": ledger}})), debug={debug})
    kept.clear()
    gc.collect()
    assert len(ledger.records()) == 1, len(ledger.records())
"""


@pytest.mark.parametrize("way", WAYS)
def test_the_record_is_there_and_nobody_complains(way: str) -> None:
    body = textwrap.indent(textwrap.dedent(WAYS[way]).strip(), "    ")
    done = forked.run("-c", PROGRAM.format(way=body, debug=way == "break"))
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "asyncgen" in line or "destroyed" in line], done.stderr
    assert "unraisable" not in done.stderr
    assert "never retrieved" not in done.stderr


def test_a_stream_that_is_open_when_the_interpreter_ends_has_its_record_too(tmp_path: Path) -> None:
    program = f"""
from s2t_agents import ChatS2T, Ledger
from s2t_agents.testing import tiny_model

model = ChatS2T(model=tiny_model(), max_tokens=300, ledger=Ledger.open({str(tmp_path / "costs.jsonl")!r}))
left = model.stream("hello")
next(left)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr, done.stderr
    assert len(Ledger.reading(tmp_path / "costs.jsonl").records()) == 1


DAEMONS = """
import threading

def generate(start):
    for _ in engine.steps([start, 66, 67], Sampling(max_tokens=90_000, ignore_eos=True)):
        begun.release()

begun = threading.Semaphore(0)
for start in range(65, 65 + {threads}):
    threading.Thread(target=generate, args=(start,), daemon=True).start()
for _ in range(100):
    begun.acquire()
end_slowly()
"""

ENGINE = """
from s2t_agents.engine.engine import Engine
from s2t_agents.testing import tiny_model
from s2t_agents.types import Sampling

engine = Engine(tiny_model(max_position_embeddings=100_000))
"""


CHAT = """
import threading, time
import torch
from s2t_agents import ChatS2T
from s2t_agents.escalation import Escalation
from s2t_agents.llms import LocalLLM
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import when

tiny = tiny_model(max_position_embeddings=100_000)
begun = threading.Semaphore(0)

def in_daemon_thread(work):
    threading.Thread(target=work, daemon=True).start()
    for _ in range(20):
        begun.acquire()
"""
BETWEEN_FORWARDS = (
    CHAT
    + """
def seldom(proposal):
    torch.rand(600, 600) @ torch.rand(600, 600)  # nearly all of a step
    return False

def step_after_step():
    escalation = Escalation(LocalLLM(tiny))
    model = ChatS2T(model=tiny, escalation=escalation, trigger=when(seldom), max_tokens=90_000)
    for _ in model.stream("hello"):
        begun.release()

def call_after_call():
    model = ChatS2T(model=tiny, max_tokens=2)
    while True:
        model.invoke("hello " * 20)
        begun.release()

in_daemon_thread(step_after_step)
in_daemon_thread(call_after_call)
end_slowly()
"""
)


@pytest.mark.slow
def test_daemon_threads_compute_between_forwards_as_the_interpreter_ends() -> None:
    done = ended(BETWEEN_FORWARDS)
    assert (done.returncode, done.stderr) == (0, "")


def test_whoever_computes_is_waited_for_and_nobody_else_begins() -> None:
    computing, order = Computing(), []
    inside, go_on = threading.Event(), threading.Event()

    def under_way() -> None:
        with computing, computing:
            inside.set()
            go_on.wait()
            with computing:  # part of what is under way
                order.append("computed")

    def too_late() -> None:
        order.append("tried")
        with computing:
            order.append("began")

    first = threading.Thread(target=under_way)
    first.start()
    inside.wait()
    threading.Timer(0.1, go_on.set).start()
    computing.stop_others()
    with computing:  # who ends the interpreter may
        order.append("stopped")
    first.join()
    second = threading.Thread(target=too_late, daemon=True)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert order == ["computed", "stopped", "tried"]


@pytest.mark.slow
def test_a_generation_that_waits_for_its_slot_holds_nothing_up() -> None:
    program = (
        """
import atexit, time
atexit.register(lambda: print(time.monotonic() - began < 3))  # registered first: runs last
"""
        + CHAT
        + """
from s2t_agents.scheduling.admission import Concurrency

model = ChatS2T(model=tiny, max_tokens=90_000, concurrency=Concurrency(running=1))
first = model.stream("hello")
next(first)

def work():
    begun.release(20)
    next(model.stream("hello"))

def begin():
    global began
    began = time.monotonic()

atexit.register(begin)
in_daemon_thread(work)
"""
    )
    done = ended(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.slow
def test_what_runs_at_the_end_still_gets_an_answer_and_nothing_else_goes_on() -> None:
    before = "import atexit\natexit.register(lambda: print(len(list(engine.steps([65], Sampling(max_tokens=5))))))\n"
    program = before + ENGINE + DAEMONS.format(threads=2)  # registered first: runs after the package's own end
    done = ended(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")
