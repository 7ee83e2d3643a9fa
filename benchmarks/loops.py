"""Agent loops through ``ChatS2T``: eight conversations with tool calls at once, beside one by one, and beside a bound.

Each agent has a thread. It sends its whole conversation again every turn, is answered by a tool call, and sends the
tool's result; all share a system prompt and the tool.

The bound is what no schedule can beat: every token of a prompt that nobody has read before is read once, at the speed
of the arithmetic (a long prompt alone), and every other step is one of all agents together, at a batch's cost. Of each,
the cheaper of our engine and transformers counts.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, takewhile
from typing import Any
from uuid import uuid4

import torch
from langchain_core.messages import ToolMessage

from s2t_agents import Engine, LanguageModel
from s2t_agents.backends.cpu_threads import release_threads
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.types import Sampling

from .decode import Generate, finish
from .parallel import Answer, compared
from .shapes import random_prompt
from .timed_chat import TimedChat, tool


def run(
    model: LanguageModel,
    *,
    at_once: int = 8,
    system: int = 128,
    new: int = 32,
    turns: int = 3,
    tokens: int = 48,
    long_prompt: int = 512,
) -> dict[str, Any]:
    """The loops both ways, and their bound.

    Args:
        model: see ``shapes.measured_model``.
        at_once: agents, each in its own thread.
        system: tokens of the system prompt that all share; the tool's definition comes on top.
        new: tokens that each turn adds before the answer: a question, a tool's result.
        turns: of each agent.
        tokens: of each answer, about.
        long_prompt: tokens of the prompt that the speed of reading is taken from.

    Returns:
        See ``parallel.compared``, and ``bound``: its seconds, what they are made of, and ``share``, the part of the
        measured time that the bound is.
    """
    timed = TimedChat(model, tokens)
    encoder, schema = PromptEncoder(model.tokenizer), tool(timed.least)
    shared = timed.text(system)
    prompts: dict[tuple[int, int], list[int]] = {}

    def agent(n: int, scope: str) -> list[Answer]:
        messages = timed.conversation(0, new)
        messages[0].content = shared
        messages[1].content = f"Agent {n}. {messages[1].content}"
        said = []
        for turn in range(turns):
            prompts[n, turn] = encoder.encode(messages, (schema,))
            answer = timed.answer(messages, scope=scope, tools="any")
            said.append((answer.ids, answer.chosen))
            results = [ToolMessage(timed.text(new), tool_call_id=call["id"]) for call in answer.message.tool_calls]
            messages = [*messages, answer.message, *results]
        return said

    agent(at_once, uuid4().hex)  # the grammar is compiled, and what else happens once
    found, answers = compared(model, at_once, agent)
    new_tokens = unread([[(prompts[n, turn], answers[n][turn][0]) for turn in range(turns)] for n in range(at_once)])
    steps = sum(len(stamps) for said in answers for _, stamps in said) / at_once
    prompt_s, step_s = _reading(model, long_prompt), _step(model, at_once, tokens)
    seconds = new_tokens * prompt_s + steps * step_s
    bound = {
        "seconds": seconds,
        "prompt_tokens": new_tokens,
        "prompt_tokens_per_s": 1 / prompt_s,
        "steps": steps,
        "step_ms": step_s * 1000,
        "share": seconds / found["together_s"],
    }
    return {"system": system, "new": new, "turns": turns, "tokens": tokens, **found, "bound": bound}


def unread(agents: list[list[tuple[list[int], list[int]]]]) -> int:
    """Tokens of all prompts that were in no earlier prompt or answer: of the agent's own, or first of another's."""
    firsts = [said[0][0] for said in agents]
    shared = min((_common(firsts[0], other) for other in firsts[1:]), default=0)
    found = shared
    for said in agents:
        read = said[0][0][:shared]
        for prompt, answer in said:
            found += len(prompt) - _common(read, prompt)
            read = [*prompt, *answer[:-1]]
    return found


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _reading(model: LanguageModel, tokens: int) -> float:
    """Seconds per token of a prompt read alone: the engine's first token, or transformers' forward."""
    prompt, ours, theirs = random_prompt(model, tokens), [], []
    for _ in range(3):
        started = time.perf_counter()
        steps = Engine(model).steps(prompt, cache_scope=uuid4().hex)
        next(steps)
        ours.append(time.perf_counter() - started)
        steps.close()  # type: ignore[attr-defined]
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=model.device)
            finish(model)
            started = time.perf_counter()
            model.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            finish(model)
            theirs.append(time.perf_counter() - started)
    release_threads()  # transformers' forward ran in this thread: its OpenMP threads would slow down the scheduler's
    return min(statistics.median(ours), statistics.median(theirs)) / tokens


def _step(model: LanguageModel, at_once: int, tokens: int) -> float:
    """Seconds of a step of so many sequences together, prompts read: the engine's, or ``generate``'s."""
    prompts = [random_prompt(model, 64, seed) for seed in range(at_once)]
    engine, scope = Engine(model), uuid4().hex

    def gaps(n: int) -> list[float]:
        steps = engine.steps(prompts[n], Sampling(max_tokens=tokens), cache_scope=scope)
        stamps = [time.perf_counter() for _ in steps]
        return [b - a for a, b in pairwise(stamps)]

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(gaps, range(at_once)))  # reads the prompts
        ours = [gap for each in pool.map(gaps, range(at_once)) for gap in each]
    theirs = [b - a for a, b in pairwise(Generate(model, prompts[:1])(tokens, [0] * at_once))]
    return min(statistics.median(ours), statistics.median(theirs))
