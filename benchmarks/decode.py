"""Time per token, side by side in one run: transformers, ours, ours with a selector, the published scheme, Maj@8.

Rows take turns (A B C A B C ...), all make the same number of tokens after the same prefix, and ratios are taken within
each turn before their median. Decoding is timed from the first token to the last; the first token's time stands beside
it, cold (the prompt is read) and warm (its KV is at hand).

The published scheme (S2T, arXiv 2604.26940) scores a candidate by reading prefix and candidate again, without KV. Its
selection is timed on its own and added to our greedy step at each rate; where K whole prefixes would take minutes, one
is timed and multiplied, and the row says ``extrapolated``. Rows that say ``composed`` were added up like that.
"""

from __future__ import annotations

import copy
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from s2t_agents.backends.torch.lora import Lora
from s2t_agents.engine.engine import Engine
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors import Selector
from s2t_agents.selectors.activated import ActivatedSelector
from s2t_agents.selectors.head import HeadSelector
from s2t_agents.triggers import Trigger, when
from s2t_agents.types import Sampling, Step

from .shapes import random_prompt

MS = 1000.0
K = 8
RATES = (0.0, 0.01, 0.05, 0.1, 0.2)
WHOLE_ROWS = 4096
"""Tokens of K prefixes up to which the published scheme's selection is timed whole."""


Run = Callable[[bool], Iterable[float]]
"""One answer of a row, and the time at which each token came; told whether the prompt's KV may be found again."""


@dataclass
class Timed:
    """What was measured of one row: ms to the first token, and per token after it, one number a repeat."""

    first_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    tokens_each: int = 1

    def add(self, started: float, stamps: list[float]) -> None:
        """One run, from the times at which its tokens came."""
        self.first_ms.append((stamps[0] - started) * MS)
        self.token_ms.append((stamps[-1] - stamps[0]) * MS / (len(stamps) - 1) / self.tokens_each)

    def over(self, other: Timed) -> float:
        """Median over the repeats of this row's time over the other's in the same repeat: drift cancels out."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.token_ms, other.token_ms, strict=True))

    def beyond(self, other: Timed) -> float:
        """Median over the repeats of the ms per token that this row takes longer than the other."""
        return statistics.median(ours - theirs for ours, theirs in zip(self.token_ms, other.token_ms, strict=True))


def run(
    model: LanguageModel, *, prefix: int, tokens: int = 101, repeats: int = 3, rates: tuple[float, ...] = RATES
) -> dict[str, Any]:
    """All rows on one model and prefix.

    Args:
        model: see ``shapes.measured_model``.
        prefix: tokens of the prompt.
        tokens: generated per run, at least 2; 101 let a rate of 1% fire once after the first token.
        repeats: of each row; prompts are read in the first (cold), their KV is at hand in the others (warm).
        rates: forced trigger rates that are run, 0 among them; the others of ``RATES`` are composed from the largest.

    Returns:
        ``{"rows": {name: {"ms_per_token", "tokens_per_s", "over_generate", "over_greedy", ...}}, ...}``. Ratios are
        medians of the ratios within each repeat.
    """
    prompt = random_prompt(model, prefix)
    rows = _rows(model, prompt, tokens, rates)
    timed = {name: Timed(tokens_each=8 if name == "maj8" else 1) for name in rows}
    selection_s, extrapolated = _published_selection(model, prompt)
    for repeat in range(repeats):
        for name, work in rows.items():
            started = time.perf_counter()
            timed[name].add(started, list(work(repeat > 0)))
    found = {name: _row(each, timed) for name, each in timed.items()}
    greedy, fastest = found["engine"]["ms_per_token"], found["generate"]["ms_per_token"]
    for kind in ("head", "activated"):
        plain = found[f"{kind}@0"]
        selection = max(0.0, timed[f"{kind}@{max(rates):g}"].beyond(timed[f"{kind}@0"])) / max(rates) / greedy
        for rate in RATES:
            if rate not in rates:
                over = plain["over_greedy"] + rate * selection
                found[f"{kind}@{rate:g}"] = _composed(over, greedy, fastest)
    for rate in RATES:
        over = 1 + rate * selection_s * MS / greedy
        found[f"published@{rate:g}"] = _composed(over, greedy, fastest, extrapolated=extrapolated)
    return {
        "model": model.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "prefix": prefix,
        "tokens": tokens,
        "repeats": repeats,
        "k": K,
        "rows": found,
        "published_selection_ms": selection_s * MS,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _composed(over: float, greedy: float, generate: float, **more: bool) -> dict[str, Any]:
    """A row that was not run, from its ratio to a greedy step: a step, and the selection's share of it."""
    ms = over * greedy
    ratios = {"over_generate": ms / generate, "over_greedy": over}
    return {"ms_per_token": ms, "tokens_per_s": MS / ms, **ratios, "composed": True, **more}


def _row(timed: Timed, rows: dict[str, Timed]) -> dict[str, Any]:
    ms = statistics.median(timed.token_ms)
    return {
        "ms_per_token": ms,
        "tokens_per_s": MS / ms,
        "over_generate": timed.over(rows["generate"]),
        "over_greedy": timed.over(rows["engine"]),
        "first_token_cold_ms": timed.first_ms[0],
        "first_token_warm_ms": statistics.median(timed.first_ms[1:]) if timed.first_ms[1:] else None,
    }


def _rows(model: LanguageModel, prompt: list[int], tokens: int, rates: tuple[float, ...]) -> dict[str, Run]:
    """Per row a run that gives the time of every token."""
    theirs = Generate(model, [prompt])
    rows: dict[str, Run] = {
        "generate": lambda warm: theirs(tokens, cold=not warm),
        "engine": lambda warm: stepped(Engine(model, k=K), prompt, tokens, warm=warm),
    }
    for kind, selector in selectors(model).items():
        for rate in rates:
            engine = Engine(model, k=K, trigger=at_rate(rate), selector=selector)
            rows[f"{kind}@{rate:g}"] = lambda warm, engine=engine: stepped(engine, prompt, tokens, warm=warm)  # type: ignore[misc]
    rows["maj8"] = lambda warm: theirs(tokens, [0] * 8, cold=not warm, do_sample=True)
    return rows


def selectors(model: LanguageModel) -> dict[str, Selector]:
    """Fresh selectors of both kinds: what they say costs the same as after training. Adapters are fp32, as loaded."""
    lora = Lora.fresh(model.model, targets=["q_proj", "k_proj", "v_proj", "o_proj"], rank=8, alpha=16)
    return {
        "head": HeadSelector(model).eval(),
        "activated": ActivatedSelector(model, lora).eval(),
    }


def at_rate(rate: float) -> Trigger:
    """Fires at a share of the steps, evenly; it reads the entropy, as a real trigger does."""

    def fires(proposal: Proposal) -> bool:
        at = len(proposal.prefix)
        return proposal.entropy >= 0 and int((at + 1) * rate) > int(at * rate)

    return when(fires, f"forced at {rate:g}")


def stepped(engine: Engine, prompt: list[int], tokens: int, *, warm: bool = False) -> Iterator[float]:
    """When each token of an answer of ours came; KV of an earlier run is reused where it is to be warm."""
    if not warm:
        engine.slm.prefix_cache.clear()
    steps: Iterator[Step] = engine.steps(prompt, Sampling(max_tokens=tokens))
    for _ in steps:
        yield time.perf_counter()


class Watch(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token came, and stops nothing."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """A token of every row has come."""
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Generate:
    """transformers' own answers, in a batch; the first leaves the KV of all prompts to those after it.

    Args:
        model: whose ``generate`` is called.
        prompts: token ids, of one length.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model, self._ids = model.model, torch.tensor(prompts, device=model.device)
        self._kv: DynamicCache | None = None

    @torch.inference_mode()
    def __call__(self, tokens: int, rows: Sequence[int] = (0,), *, cold: bool = False, **options: Any) -> list[float]:
        """When each token of the answers came.

        Args:
            tokens: of each answer.
            rows: the number of each answer's prompt.
            cold: read the prompts whether or not all but their last token is at hand.
            **options: of ``generate``.
        """
        watch, at = Watch(), torch.tensor(rows, device=self._ids.device)
        settings = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0, **options}
        if self._kv is not None and not cold:
            settings["past_key_values"] = copy.deepcopy(self._kv)
            settings["past_key_values"].batch_select_indices(at)
        self._model.generate(self._ids[at], stopping_criteria=StoppingCriteriaList([watch]), **settings)
        if self._kv is None:  # behind the last stamp: no warm run is to wait for it
            self._kv = DynamicCache()
            self._model(input_ids=self._ids[:, :-1], past_key_values=self._kv, use_cache=True, logits_to_keep=1)
        return watch.stamps


@torch.inference_mode()
def _published_selection(model: LanguageModel, prompt: list[int]) -> tuple[float, bool]:
    """Seconds to read K times prefix and candidate without KV, and whether one reading was multiplied."""
    rows = K if K * len(prompt) <= WHOLE_ROWS else 1
    ids = torch.tensor([[*prompt, 5 + at] for at in range(rows)], device=model.device)
    model.torch_backend.decoder(input_ids=ids[:, -2:], use_cache=False)
    finish(model)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        model.torch_backend.decoder(input_ids=ids, use_cache=False)
        finish(model)
        seconds.append(time.perf_counter() - started)
    return min(seconds) * K / rows, rows < K


def finish(model: LanguageModel) -> None:
    """Wait until a GPU has done what it was told; a CPU has done it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
