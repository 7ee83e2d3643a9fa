"""Are the picks over a server the picks of the same model in this process? Exits with 1 where they are not.

python examples/vllm/compare.py --url http://127.0.0.1:8000/v1 --model s2t-demo-llm
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field

from langchain_core.messages import HumanMessage

from s2t_agents import Engine, Escalation, LanguageModel, LocalLLM, OpenAILLM
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.demo.world import generate
from s2t_agents.llms import LLMSelector
from s2t_agents.triggers import entropy
from s2t_agents.types import Sampling, Step

TOLERANCE = 1e-3
"""Nats; two implementations of one model in fp32 differ by about 1e-5."""


@dataclass
class Comparison:
    """What was seen: questions asked, how many were picked alike, the largest difference in nats, times in ms."""

    answers: int = 0
    questions: int = 0
    same_picks: int = 0
    same_answers: int = 0
    unanswered: int = 0
    largest_difference: float = 0.0
    server_ms: float = 0.0
    local_ms: float = 0.0
    _waits: dict[str, list[float]] = field(default_factory=lambda: {"server": [], "local": []}, repr=False)

    def add(self, far: list[Step], near: list[Step]) -> None:
        """Compare one answer, up to where the two part."""
        self.answers += 1
        self.same_answers += [s.token_id for s in far] == [s.token_id for s in near]
        for ours, theirs in zip(far, near, strict=False):
            if ours.prefix_tokens != theirs.prefix_tokens or not ours.escalation or not theirs.escalation:
                continue
            self.questions += 1
            self._waits["server"].append(ours.escalation.wait_s * 1e3)
            self._waits["local"].append(theirs.escalation.wait_s * 1e3)
            if ours.picked_by != "llm":
                self.unanswered += 1
                print(ours.escalation.reason, file=sys.stderr)
                continue
            self.same_picks += ours.token_id == theirs.token_id
            gaps = [abs(a.llm - b.llm) for a, b in zip(ours.candidates, theirs.candidates, strict=True)]
            self.largest_difference = max(self.largest_difference, *gaps)
            if ours.token_id != theirs.token_id:
                break

    def finish(self) -> bool:
        """Fill in the medians; whether all is alike."""
        self.server_ms = round(statistics.median(self._waits["server"] or [0.0]), 2)
        self.local_ms = round(statistics.median(self._waits["local"] or [0.0]), 2)
        alike = self.same_picks == self.questions > 0 and self.same_answers == self.answers
        return alike and self.largest_difference <= TOLERANCE


def answer(slm: LanguageModel, llm: LLMSelector, prompt: list[int]) -> list[Step]:
    """One answer, the LLM picking at every step the SLM is unsure of."""
    engine = Engine(slm, trigger=entropy(above=0.05), escalation=Escalation(llm, margin=1.0))
    return list(engine.steps(prompt, Sampling(max_tokens=96)))


def main() -> None:
    """Answer held-out problems twice and compare."""
    parser = argparse.ArgumentParser(description="Compare an OpenAI-compatible server with the same model in process.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="as the server calls it")
    parser.add_argument("--llm", default="s2t-demo-llm", help="the same model, for this process")
    parser.add_argument("--slm", default="s2t-demo")
    parser.add_argument("--answers", type=int, default=20)
    given = parser.parse_args()
    slm = LanguageModel.load(given.slm)
    far, near = OpenAILLM(given.url, given.model, timeout_s=60, attempt_s=60), LocalLLM(given.llm)
    far.check(slm)
    encoder, seen = PromptEncoder(slm.tokenizer), Comparison()
    for seed in range(given.answers):
        prompt = encoder.encode([HumanMessage(generate(seed, "heldout", "word").question)])
        seen.add(answer(slm, far, prompt), answer(slm, near, prompt))
    alike = seen.finish()
    numbers = {name: value for name, value in asdict(seen).items() if not name.startswith("_")}
    print(json.dumps({**numbers, "alike": alike}))
    sys.exit(0 if alike else 1)


if __name__ == "__main__":
    main()
