"""Are the tokens of an SLM on a server those of the same model in this process? Exits with 1 where too few answers are.

python examples/vllm/compare_slm.py --address vllm://127.0.0.1:8000/s2t-demo --selector s2t-demo
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial

import httpx
from langchain_core.messages import HumanMessage

from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.chat.runtime import EngineSettings, build
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
        tokens_per_s: by number of answers at once: of the server alone (one request an answer), of the engine over the
            server, of the engine in this process.
    """

    selector: str | None
    answers: int = 0
    same: int = 0
    tokens: int = 0
    triggered: tuple[int, int] = (0, 0)
    flipped: tuple[int, int] = (0, 0)
    tokens_per_s: dict[int, tuple[float, float, float]] = field(default_factory=dict)


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


def rate(run: Callable[..., int], prompts: list[list[int]], tokens: int, at_once: int) -> float:
    """Tokens per second."""
    started = time.perf_counter()
    return round(run(prompts, tokens, at_once) / (time.perf_counter() - started), 1)


def bare(address: str, prompts: list[list[int]], tokens: int, at_once: int) -> int:
    """Tokens of as many plain requests."""
    host, _, name = address.removeprefix("vllm://").partition("/")
    with httpx.Client(timeout=120) as client, ThreadPoolExecutor(at_once) as pool:

        def ask(prompt: list[int]) -> int:
            body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 20}
            reply = client.post(f"http://{host}/v1/completions", json=body).raise_for_status().json()
            return int(reply["usage"]["completion_tokens"])

        return sum(pool.map(ask, prompts))


def main() -> None:
    """Answer held-out problems twice, compare, and measure."""
    parser = argparse.ArgumentParser(description="Compare an SLM on a vLLM server with the same model in process.")
    parser.add_argument("--address", required=True, help="vllm://host:port/name")
    parser.add_argument("--slm", default="s2t-demo", help="the same model, for this process")
    parser.add_argument("--selector", help="that runs inside the server")
    parser.add_argument("--answers", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=48)
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
    for at_once in given.at_once:
        batch = [[*prompt[:-1], at + 5, prompt[-1]] for at, prompt in enumerate(prompts[: 2 * at_once])]  # not cached
        seen.tokens_per_s[at_once] = tuple(
            rate(run, batch, given.tokens, at_once)
            for run in (partial(bare, given.address), partial(generated, far), partial(generated, near))
        )
    print(json.dumps(asdict(seen)))
    sys.exit(0 if seen.same >= ENOUGH * seen.answers else 1)


if __name__ == "__main__":
    main()
