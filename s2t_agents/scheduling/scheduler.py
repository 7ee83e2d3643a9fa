"""Continuous batching: one scheduler per model runs the work of all concurrent callers in shared forwards.

    caller a    append ──> wait ─────────────────> engine ── append ──> wait
    caller b    append ──> wait ─────────────────> engine ── score ───> wait
    scheduler   schedule [a b] ─ forward ─ postprocess ── schedule [a b] ─ forward ─ postprocess

``schedule`` takes single tokens and candidates of all callers first, then chunks of prompts (chunked prefill beside
decoding); where a forward holds one request only, it alternates between one chunk and all single tokens and candidates
that wait. A prompt whose deadline passes goes back to its caller between two chunks. ``postprocess`` divides the
forward's time by rows and hands outputs out, to one caller after another: what they do with them is Python, and callers
that woke at once would take the interpreter's lock from each other. A sequence advances only when its caller asks for
the next token: nothing is computed for a stream that is not read.

The loop runs in a thread of its own. A caller that is alone, on a model with short steps, runs the same loop in its own
thread instead: there the hand-over would cost more than it gives.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from math import inf

from ..backends.base import Backend, Output, Work
from ..backends.cpu_threads import release_threads, wanted_threads, with_threads
from ..fork_safety import hold_while_forking, renew_in_child
from .computing import computing
from .requests import AppendRequest, ForwardRequest, ScoreRequest, TreeRequest

BATCH_WAIT = 0.25
"""How long a batch waits for the callers of the last one, as a share of what that took."""

BATCH_WAIT_S = 0.05
"""And at most so long, in seconds."""

HAND_OUT = 0.5
"""How long outputs are handed out one after another, as a share of what the forward took; then all get theirs."""

TURN = 0.125
"""How long the next caller's outputs wait for the one before to come back, as a share of what the forward took."""

TURN_S = 0.001
"""And at most so long, in seconds."""

IDLE_S = 2.0
"""Seconds without work after which the scheduler's thread ends; the next request starts another."""

FORWARD_EXIT_S = 30.0
"""How long the end of the interpreter waits for one forward, in seconds."""

_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()
_threads: weakref.WeakKeyDictionary[threading.Thread, threading.Condition] = weakref.WeakKeyDictionary()
"""Schedulers' threads, and what wakes each."""
_leaving = threading.Event()


@atexit.register
def _leave() -> None:
    """At interpreter exit: wait for the forwards under way and what is computed between them; no daemon thread begins
    another.

    ``scheduling.computing`` says why. llama.cpp aborts like torch: its C++ logs through a Python callback.
    """
    computing.stop_others()  # first: they may wait for a forward
    _leaving.set()
    for thread, wanted in list(_threads.items()):
        if thread.is_alive():  # those of a forked process stayed with its parent
            with wanted:
                wanted.notify_all()
            thread.join(FORWARD_EXIT_S)
    for scheduler in list(_schedulers):
        scheduler.stop_others()


class Scheduler:
    """Runs the requests of concurrent callers on one backend. Safe under threads.

    A thread that holds the backend's lock (an exclusive turn) runs its requests at once, alone. So does every caller of
    a backend on another machine, which has a scheduler of its own.

    Args:
        backend: whose batches these are.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._mutex = threading.Lock()
        hold_while_forking(self, "_mutex")
        renew_in_child(self._reset)
        self._changed = threading.Condition(self._mutex)
        """Notified when a forward has ended, or other callers' requests have come."""
        self._wanted = threading.Condition(self._mutex)
        """Notifies the scheduler's thread alone: a caller that drives the loop wakes no other thread at every token."""
        self._waiting: deque[ForwardRequest] = deque()
        self._running: Sequence[ForwardRequest] = ()
        self._outputs: deque[list[ForwardRequest]] = deque()
        """Requests that are done and whose caller waits for its turn, those of each caller together."""
        self._turn: int | None = None
        """The caller that has got its outputs last, until it is back."""
        self._driver: int | None = None
        """Identifier of the thread that runs the loop now."""
        self._thread: threading.Thread | None = None
        self._last: frozenset[int] = frozenset()
        """Callers of the last forward: they will probably be back in a moment."""
        self._read_chunk = False
        """The last forward was a chunk of a prompt; read where a forward holds only one request."""
        self._took_s, self._step_s = 0.0, inf
        self._threads = 1
        """OpenMP threads that the latest caller's operations run on."""
        self._has_team = self._release_wanted = False
        """The scheduler's thread has OpenMP threads, and is to release them."""
        _schedulers.add(self)

    def run(self, requests: Sequence[ForwardRequest], caller: object = None) -> None:
        """Return when all requests are done, each with its output or its error.

        Args:
            requests: at least one.
            caller: identifies the caller, whom the next forward may wait for; by default the first request's cache.

        Raises:
            BaseException: the wait was interrupted; what was not begun is dropped, a forward under way is waited for.
        """
        if self._backend.capabilities.concurrent_forwards:
            for request in requests:
                self._forward_one(request, request.work(request.rows))
            return
        if self._backend.lock._is_owned():
            self._run_exclusively(requests)
            return
        threads = wanted_threads()
        for request in requests:
            request.caller = id(requests[0].cache if caller is None else caller)
        try:  # from the first line on: an interrupt may come between any two
            with self._mutex:
                self._waiting.extend(requests)
                if self._turn == requests[0].caller:
                    self._hand_out()
                here = self._may_drive(requests)
                if here:
                    self._driver = threading.get_ident()
                    self._release_team()
                else:
                    self._threads = threads
                    self._ensure_thread()
                    if self._callers_are_back:
                        self._changed.notify_all()
                    self._wanted.notify()
            if here:
                self._drive(requests, threads)
            else:
                self._wait(requests)
        except BaseException:
            self._drop(requests)
            raise

    def generation_ended(self, caller: object) -> None:
        """No forward is held back for this caller any more. Without other requests, the OpenMP threads are released, so
        that other operations have the cores.

        A hint that never blocks: garbage collection may end a generation inside any block of this very thread.

        Args:
            caller: as in ``run``.
        """
        if self._mutex.acquire(blocking=False):
            try:
                if id(caller) in self._last:
                    self._last -= {id(caller)}
                    self._changed.notify_all()
                if self._turn == id(caller):
                    self._hand_out()
                if not self._waiting:
                    self._release_team()
            finally:
                self._mutex.release()
        release_threads()  # the caller's own, if it drove the loop: its thread may not compute again

    def stop_others(self) -> None:
        """Acquire the backend's lock for good: this thread may still run forwards, those of other threads block."""
        self._backend.lock.acquire(timeout=FORWARD_EXIT_S)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and self._driver is None

    @property
    def _callers_are_back(self) -> bool:
        """Every caller of the last forward waits for the next one, or its generation has ended."""
        return self._last <= {request.caller for request in self._waiting}

    def _reset(self) -> None:
        """Also in a forked child: neither the thread nor the callers came along."""
        self._changed, self._wanted = threading.Condition(self._mutex), threading.Condition(self._mutex)
        self._waiting, self._running, self._last = deque(), (), frozenset()
        self._outputs, self._turn = deque(), None
        self._driver = self._thread = None
        self._has_team = self._release_wanted = False

    def _may_drive(self, requests: Sequence[ForwardRequest]) -> bool:
        """Whether the caller is alone and steps are short, so that it runs the loop in its own thread."""
        short = self._step_s <= self._backend.limits.hand_over_s
        alone = self._driver is None and len(self._waiting) == len(requests)
        return short and alone and self._last <= {request.caller for request in requests}

    def _release_team(self) -> None:
        """The scheduler's thread has nothing to compute: its OpenMP threads would slow down those of others."""
        if self._has_team:
            self._release_wanted = True
            self._wanted.notify()

    def _ensure_thread(self) -> None:
        if self._thread is None and not _leaving.is_set():
            arguments = weakref.ref(self), self._wanted  # weak: an idle thread does not keep its model alive
            self._thread = threading.Thread(target=self._serve, args=arguments, name="s2t-scheduler", daemon=True)
            _threads[self._thread] = self._wanted
            self._thread.start()

    def _drive(self, requests: Sequence[ForwardRequest], threads: int) -> None:
        """The loop in the caller's thread, until its requests are done."""
        self._threads = threads
        while not all(request.done for request in requests):
            batched = self._compute(threads)
            self._postprocess(batched, driven=not all(request.done for request in requests))

    def _wait(self, requests: Sequence[ForwardRequest]) -> None:
        """Until the scheduler's thread, or another caller, has run the requests."""
        release_threads()  # the caller's own OpenMP threads, if it has computed something itself
        for request in requests:
            request.wait()

    def _drop(self, requests: Sequence[ForwardRequest]) -> None:
        """The caller leaves: forget its requests, but wait for a forward in another thread that writes to their caches.

        That is stopped half-way, where the engine can, if no other request takes part in it. If the caller drives the
        loop, that breaks off, and others' requests go on without it.
        """
        with self._mutex:
            driving = self._driver == threading.get_ident()
            self._waiting = deque(request for request in self._waiting if request not in requests)
            if not driving and self._running and all(request in requests for request in self._running):
                self._backend.interrupt()
            while not driving and any(request in self._running for request in requests):
                self._changed.wait()
        if driving:
            self._postprocess((), driven=False)

    def _compute(self, threads: int) -> Sequence[ForwardRequest]:
        """One forward; returns the requests that took part."""
        requests, batch = self._schedule()
        if requests:
            with with_threads(threads), self._backend.lock:
                self._forward(requests, batch)
        return requests

    def _schedule(self) -> tuple[list[ForwardRequest], list[Work]]:
        """What goes into the next forward: single tokens and candidates first, then chunks of prompts."""
        with self._mutex:
            self._wait_for_callers()
            waiting = list(self._waiting)
            for request in waiting:
                if isinstance(request, AppendRequest):
                    request.expire()
            if not waiting or any(request.done for request in waiting):  # those that have expired go back first
                return [], []
            if self._backend.capabilities.batching:
                requests, batch = self._batch(waiting)
            else:
                requests, batch = self._next_request(waiting)
            self._running = requests
            return requests, batch

    def _wait_for_callers(self) -> None:
        """Until every caller of the last forward is back, or the time for that is over; all have got their outputs."""
        until = time.monotonic() + HAND_OUT * self._took_s
        while self._outputs:
            held = len(self._outputs)
            self._changed.wait(self._turn_s)
            if len(self._outputs) == held or time.monotonic() > until:
                self._hand_out_all()
        until = time.monotonic() + min(BATCH_WAIT * self._took_s, BATCH_WAIT_S)
        while not self._callers_are_back:
            left = until - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    @property
    def _turn_s(self) -> float:
        """How long the next caller waits for the one before."""
        return min(TURN * self._took_s, TURN_S)

    def _hand_out(self) -> None:
        """The next caller gets its outputs; after one that waits for more of its requests, another."""
        self._turn, waiting = None, {request.caller for request in self._waiting}
        while self._outputs and self._turn is None:
            for request in self._outputs[0]:  # which stay: an interrupt must not lose those of another caller
                request.finish()
            caller = self._outputs.popleft()[0].caller
            self._turn = caller if caller not in waiting else None

    def _hand_out_all(self) -> None:
        while self._outputs:
            self._hand_out()

    def _next_request(self, waiting: Sequence[ForwardRequest]) -> tuple[list[ForwardRequest], list[Work]]:
        """The next request where a forward holds only one: after a chunk of a prompt, all that wait for one forward."""
        if self._read_chunk:
            # a tree stays behind what it comes after
            waiting = sorted(waiting, key=lambda each: not each.single_forward or isinstance(each, TreeRequest))
            self._waiting = deque(waiting)
        request = waiting[0]
        self._read_chunk = not request.single_forward
        limits = self._backend.limits
        return [request], [request.work(limits.prefill_beside if len(waiting) > 1 else limits.prefill_alone)]

    def _batch(self, waiting: Sequence[ForwardRequest]) -> tuple[list[ForwardRequest], list[Work]]:
        requests = self._single_forwards(waiting)
        batch = [request.work(request.rows) for request in requests]
        room = self._backend.limits.prefill_beside if requests else self._backend.limits.prefill_alone
        for request in waiting:
            tokens = min(room, request.rows)
            if not request.single_forward and tokens:
                requests.append(request)
                batch.append(request.work(tokens))
                room -= tokens
        whole = [each for each, work in zip(requests, batch, strict=True) if len(work.ids) == each.rows]
        trees = self._ready_trees(waiting, whole)
        return [*requests, *trees], [*batch, *(request.work(request.rows) for request in trees)]

    def _ready_trees(self, waiting: Sequence[ForwardRequest], whole: Sequence[ForwardRequest]) -> list[TreeRequest]:
        """Trees whose sequence is read, or is read to its end by what this forward completes."""
        room = self._backend.limits.candidates - sum(each.rows for each in whole if isinstance(each, ScoreRequest))
        ready: list[TreeRequest] = []
        for request in waiting:
            if not isinstance(request, TreeRequest) or request.done:
                continue
            after = request.after
            if (after is None or after.done or after in whole) and (not ready or request.rows <= room):
                ready.append(request)
                room -= request.rows
        return ready

    def _single_forwards(self, waiting: Sequence[ForwardRequest]) -> list[ForwardRequest]:
        """Requests that one forward completes, first come, first served, within the limits of a forward."""
        taken: list[ForwardRequest] = []
        candidates = 0
        for request in waiting:
            if (
                not request.single_forward
                or isinstance(request, TreeRequest)
                or len(taken) == self._backend.limits.sequences
            ):
                continue
            if isinstance(request, ScoreRequest):
                if candidates and candidates + request.rows > self._backend.limits.candidates:
                    continue
                candidates += request.rows
            taken.append(request)
        return taken

    def _forward(self, requests: Sequence[ForwardRequest], batch: Sequence[Work]) -> None:
        """One forward; if it fails, one by one, so that only the failing request gets the error."""
        started, single_forward = time.monotonic(), all(request.single_forward for request in requests)
        if len(batch) == 1 or not self._forward_batch(requests, batch):
            for request, work in zip(requests, batch, strict=True):
                self._forward_one(request, work)
        self._took_s = time.monotonic() - started
        if single_forward:
            # a step that candidate scoring has prefetched tells little of the next one: hence the decaying maximum
            self._step_s = max(self._took_s, 0.8 * self._step_s) if self._step_s < inf else self._took_s

    def _forward_batch(self, requests: Sequence[ForwardRequest], batch: Sequence[Work]) -> bool:
        """All in one forward; False if that failed and nothing has changed."""
        started = time.monotonic()
        try:
            outputs = self._backend.forward(batch)
        except BaseException as error:
            for request in requests:
                request.undo()
            if self._interrupts(error):
                raise
            return False
        per_row = (time.monotonic() - started) / sum(len(work.ids) for work in batch)
        for request, work, output in zip(requests, batch, outputs, strict=True):
            request.complete(work, output)
            request.compute.add(per_row * len(work.ids))
        return True

    def _forward_one(self, request: ForwardRequest, work: Work) -> None:
        started = time.monotonic()
        if request.done:  # what it comes after has failed
            return
        try:
            output: Output
            (output,) = self._backend.forward([work])
            request.complete(work, output)
        except BaseException as error:
            if self._interrupts(error):
                request.undo()
                raise
            request.error = error
        request.compute.add(time.monotonic() - started)

    def _interrupts(self, error: BaseException) -> bool:
        """Whether this is an interrupt of the driving caller, and no failure of a request."""
        return not isinstance(error, Exception) and threading.current_thread() is not self._thread

    def _postprocess(self, requests: Sequence[ForwardRequest], *, driven: bool) -> None:
        """Hand out what is done.

        Args:
            requests: that took part in the forward.
            driven: the same thread goes on with the loop.
        """
        with self._mutex:
            done = [request for request in dict.fromkeys([*requests, *self._waiting]) if request.done]
            waiting = deque(request for request in self._waiting if not request.done)
            # in this order: an interrupt of the driving caller may come between any two, and ``_drop`` begins again
            self._outputs.extend(by_caller(done))
            self._last = frozenset(request.caller for request in requests)
            self._waiting, self._running = waiting, ()
            self._backend.resume()
            self._hand_out()
            if threading.current_thread() is not self._thread or _leaving.is_set():
                self._hand_out_all()
            if not driven:
                self._driver = None
            if self._waiting and not driven:
                self._ensure_thread()
                self._wanted.notify()
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        """The loop itself was broken off: every request under way gets the error."""
        with self._mutex:
            running, self._running, self._driver = self._running, (), None
            self._backend.resume()
            self._waiting = deque(request for request in self._waiting if request not in running)
            self._changed.notify_all()
            self._wanted.notify()
        for request in running:
            request.error = error
            request.finish()

    def _run_exclusively(self, requests: Sequence[ForwardRequest]) -> None:
        """In a thread that holds the backend's lock: to wait for others would be for ever."""
        long = self._step_s > self._backend.limits.hand_over_s
        with with_threads(wanted_threads()):
            for request in requests:
                while not request.done:
                    self._forward([request], [request.work(self._backend.limits.prefill_alone)])
        if long:
            release_threads()

    @staticmethod
    def _serve(found: weakref.ref[Scheduler], wanted: threading.Condition) -> None:
        """The scheduler's thread: iterates while there is work, releases its OpenMP threads when there is none.

        It holds its scheduler only while it works: an idle thread does not keep the model alive.
        """
        idle_since = time.monotonic()
        while True:
            with wanted:
                scheduler = found()
                if scheduler is None:
                    return
                if scheduler._thread is not threading.current_thread() or _leaving.is_set():
                    scheduler._hand_out_all()
                    return
                work = bool(scheduler._waiting) and scheduler._driver is None
                if work:
                    scheduler._driver, threads = threading.get_ident(), scheduler._threads
                    scheduler._has_team, scheduler._release_wanted = True, False
                else:
                    if time.monotonic() - idle_since > IDLE_S and not scheduler._waiting and not scheduler._outputs:
                        scheduler._thread = None
                        return
                    if scheduler._release_wanted:
                        scheduler._has_team = scheduler._release_wanted = False
                        release_threads()
                    held = len(scheduler._outputs)
                    if held:
                        if not wanted.wait(scheduler._turn_s) and len(scheduler._outputs) == held:
                            scheduler._hand_out_all()
                        continue
                    del scheduler
                    wanted.wait(IDLE_S / 4)
                    continue
            try:
                scheduler._postprocess(scheduler._compute(threads), driven=False)
            except BaseException as error:  # noqa: BLE001 - its callers raise it
                scheduler._fail(error)
            del scheduler
            idle_since = time.monotonic()


def by_caller(requests: Sequence[ForwardRequest]) -> list[list[ForwardRequest]]:
    """The requests of each caller, in the order of their first ones."""
    callers: dict[int, list[ForwardRequest]] = {}
    for request in requests:
        callers.setdefault(request.caller, []).append(request)
    return list(callers.values())
