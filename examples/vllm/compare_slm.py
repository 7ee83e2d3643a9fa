"""Are the tokens of an SLM on a server those of the same model in this process? Exits with 1 where too few answers are.

python examples/vllm/compare_slm.py --address vllm://127.0.0.1:8000/s2t-demo --selector s2t-demo
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial

import httpx
from langchain_core.messages import HumanMessage

from s2t_agents.chat.engine_settings import EngineSettings
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.chat.runtime import build
from s2t_agents.demo.world import generate
from s2t_agents.engine.engine import Engine
from s2t_agents.types import Sampling, Step

ENOUGH = 0.9
"""Share of answers that must be the same: two implementations round differently where two tokens are nearly even."""


@dataclass
class Comparison:
    """What was seen.

    Attributes:
        same: answers with the same tokens.
        triggered, flipped: steps here; their twins' on the server are in the second place.
        tokens_per_s: by number of answers at once: of the server alone (one request an answer), of the same streamed,
            of the engine over the server, of the engine in this process; medians.
        cpu_ms: milliseconds of this process's CPU a token, likewise.
    """

    selector: str | None
    answers: int = 0
    same: int = 0
    tokens: int = 0
    triggered: tuple[int, int] = (0, 0)
    flipped: tuple[int, int] = (0, 0)
    tokens_per_s: dict[int, list[float]] = field(default_factory=dict)
    cpu_ms: dict[int, list[float]] = field(default_factory=dict)


def answers(engine: Engine, prompts: list[list[int]], tokens: int, at_once: int) -> list[list[Step]]:
    """Greedy answers."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda prompt: list(engine.steps(prompt, Sampling(max_tokens=tokens))), prompts))


def generated(engine: Engine, prompts: list[list[int]], tokens: int, at_once: int) -> int:
    """Their tokens."""
    return sum(map(len, answers(engine, prompts, tokens, at_once)))


def ids(steps: list[Step]) -> list[int]:
    """Of the tokens."""
    return [step.token_id for step in steps]


def measured(run: Callable[..., int], prompts: list[list[int]], tokens: int, at_once: int) -> tuple[float, float]:
    """Tokens per second, and milliseconds of CPU a token."""
    started, spent = time.perf_counter(), time.process_time()
    written = run(prompts, tokens, at_once)
    return written / (time.perf_counter() - started), 1000 * (time.process_time() - spent) / written


def bare(
    address: str, stop_ids: list[int], prompts: list[list[int]], tokens: int, at_once: int, *, stream: bool = False
) -> int:
    """Tokens of as many plain requests, which end where the engine's answers do."""
    host, _, name = address.removeprefix("vllm://").partition("/")
    usage = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    asking = {
        "model": name,
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 20,
        "stop_token_ids": stop_ids,
        **usage,
    }
    with httpx.Client(timeout=120) as client, ThreadPoolExecutor(at_once) as pool:

        def ask(prompt: list[int]) -> int:
            with client.stream("POST", f"http://{host}/v1/completions", json={**asking, "prompt": prompt}) as reply:
                body = reply.raise_for_status().read()
            last = body.rsplit(b"data: ", 2)[1] if stream else body
            return int(json.loads(last)["usage"]["completion_tokens"])

        return sum(pool.map(ask, prompts))


def main() -> None:
    """Answer held-out problems twice, compare, and measure."""
    parser = argparse.ArgumentParser(description="Compare an SLM on a vLLM server with the same model in process.")
    parser.add_argument("--address", required=True, help="vllm://host:port/name")
    parser.add_argument("--slm", default="s2t-demo", help="the same model, for this process")
    parser.add_argument("--selector", help="that runs inside the server")
    parser.add_argument("--answers", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 4, 8, 16])
    given = parser.parse_args()
    near = build(EngineSettings(given.slm, selector=given.selector)).engine
    served = {"tokenizer": near.slm.tokenizer}
    kind = None if given.selector is None else "server"
    far = build(EngineSettings(given.address, selector=kind, k=near.k, model_kwargs=served)).engine
    encoder, seen = PromptEncoder(near.slm.tokenizer), Comparison(given.selector)
    prompts = [
        encoder.encode([HumanMessage(generate(seed, "heldout", "word").question)]) for seed in range(given.answers)
    ]
    here, there = (answers(engine, prompts, given.tokens, 8) for engine in (near, far))
    seen.answers, seen.tokens = len(prompts), sum(map(len, here))
    seen.same = sum(ids(one) == ids(two) for one, two in zip(here, there, strict=True))
    seen.triggered = tuple(sum(step.triggered for steps in each for step in steps) for each in (here, there))
    seen.flipped = tuple(sum(step.flipped for steps in each for step in steps) for each in (here, there))
    ends = sorted(near.slm.eos_ids)
    runs = [
        partial(bare, given.address, ends),
        partial(bare, given.address, ends, stream=True),
        partial(generated, far),
        partial(generated, near),
    ]
    for at_once in given.at_once:
        batch = [[*prompt[:-1], at + 5, prompt[-1]] for at, prompt in enumerate(prompts[: 2 * at_once])]
        for run in runs:
            run(batch, 2, at_once)  # every prompt is in the prefix caches
        rounds = [[measured(run, batch, given.tokens, at_once) for run in runs] for _ in range(given.rounds)]
        middle = [[statistics.median(each) for each in zip(*times, strict=True)] for times in zip(*rounds, strict=True)]
        seen.tokens_per_s[at_once] = [round(rate, 1) for rate, _ in middle]
        seen.cpu_ms[at_once] = [round(cpu, 3) for _, cpu in middle]
    print(json.dumps(asdict(seen)))
    sys.exit(0 if seen.same >= ENOUGH * seen.answers else 1)


if __name__ == "__main__":
    main()
