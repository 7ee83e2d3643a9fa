"""Measures one version of the package, row by row, as ``against`` asks: a line of JSON in, a line of JSON out.

A script, run with the version's checkout on ``PYTHONPATH``. It uses nothing but the package's public names, so that it
measures any commit that has these.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import s2t_agents
from s2t_agents import ChatS2T, Engine, LanguageModel

TEXT = "Count 12 and 7, then add 30. " * 8
PROMPT_TOKENS = 128
AT_ONCE = 8
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def loaded(folder: Path, dtype: str) -> LanguageModel:
    """The model of a folder, of random weights where it has none.

    Args:
        folder: has the tokenizer and the config.
        dtype: of random weights.
    """
    if (folder / "model.safetensors").exists():
        return LanguageModel.load(str(folder), device="cpu")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    raw = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    raw = raw.to(getattr(torch, dtype)).eval().requires_grad_(False)
    raw.get_input_embeddings().weight[tokenizer.eos_token_id] = 0  # never the largest logit: no answer ends by itself
    return LanguageModel(raw, tokenizer, name=folder.name)


class Rows:
    """What can be measured of a model.

    Args:
        model: see ``loaded``.
        tokens: of every answer.
    """

    def __init__(self, model: LanguageModel, tokens: int) -> None:
        self._model, self._tokens = model, tokens
        self._prompt = [10 + 37 * at % 240 for at in range(PROMPT_TOKENS)]
        self._stamps: list[float] = []
        self._chat = ChatS2T(model=model, max_tokens=tokens, on_step=self._stamp)

    def _stamp(self, trace_id: str, step: Any) -> None:
        self._stamps.append(time.perf_counter())

    def measured(self, row: str, scope: str) -> dict[str, float | None]:
        """ms of one row's first token, with nothing of the prompt read before, and then with all of it; ms a token."""
        if row == "eight at once":
            return {"first_cold_ms": None, "first_warm_ms": None, "ms_per_token": self._at_once(scope)}
        cold, warm = (list(self._answer(row, scope)) for _ in range(2))
        each = [(stamps[-1] - stamps[1]) / (len(stamps) - 2) for stamps in (cold, warm)]
        return {
            "first_cold_ms": 1e3 * (cold[1] - cold[0]),
            "first_warm_ms": 1e3 * (warm[1] - warm[0]),
            "ms_per_token": 1e3 * sum(each) / len(each),
        }

    def _answer(self, row: str, scope: str) -> Iterator[float]:
        """When an answer was asked for, and when each of its tokens came."""
        yield time.perf_counter()
        if row == "engine":
            steps = Engine(self._model).steps(self._prompt, cache_scope=scope)
            for _ in islice(steps, self._tokens):
                yield time.perf_counter()
            steps.close()  # type: ignore[attr-defined]
            return
        bound = self._chat.bind_tools([TOOL]) if row == "chat, tool bound" else self._chat
        self._stamps.clear()
        bound.invoke(TEXT, s2t_cache_scope=scope)
        yield from self._stamps

    def _at_once(self, scope: str) -> float:
        """ms a token, all answers together, prompts included."""
        self._stamps.clear()
        started = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda n: self._chat.invoke(f"{n}: {TEXT}", s2t_cache_scope=f"{scope}/{n}"), range(AT_ONCE)))
        return 1e3 * (time.perf_counter() - started) / len(self._stamps)


def memory_mb() -> dict[str, float]:
    """Resident memory of this process: now, and at its peak; nothing where /proc is not there."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return {}
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.MULTILINE))
    return {"rss_mb": int(found["VmRSS"]) / 1024, "peak_rss_mb": int(found["VmHWM"]) / 1024}


def main() -> None:
    """The first line says what is loaded; every further one names a row and a cache scope, or asks for the memory."""
    asked = json.loads(sys.stdin.readline())
    torch.set_num_threads(asked["threads"])
    rows = Rows(loaded(Path(asked["folder"]), asked["dtype"]), asked["tokens"])
    print(json.dumps({"package": str(Path(s2t_agents.__file__).parent)}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        found = memory_mb() if asked["row"] == "memory" else rows.measured(asked["row"], asked["scope"])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
