"""Whether a device says what the CPU says: tokens, selectors' scores, and played steps beside eager ones, in fp32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from s2t_agents.backends.torch.cuda.cuda_graph import played
from s2t_agents.backends.torch.cuda.graph_runner import GraphRunner
from s2t_agents.backends.torch.cuda.prefill_graphs import OFTEN
from s2t_agents.bundled import SLM
from s2t_agents.engine.engine import Engine
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.selectors import Selector
from s2t_agents.testing import tiny_model
from s2t_agents.types import Sampling

from .decode import selectors
from .shapes import random_prompt

FAMILIES: dict[str, dict[str, Any]] = {"qwen2": {}, "qwen3": {}, "llama": {}, "mistral": {"sliding_window": 16}}
TOLERANCE = 1e-3
AT_ONCE = 3
"""Generations that are compared running together, too."""


def run(name: str, device: torch.device, *, prompt: int = 40, tokens: int = 24) -> dict[str, Any]:
    """One model on the CPU, and on the device by graphs and eagerly.

    Args:
        name: one of ``FAMILIES``, or a path or bundled name.
        device: where it is compared; on the CPU the played step runs without capture.
        prompt: tokens.
        tokens: generated.

    Returns:
        Whether all greedy tokens are equal, alone, at once and in a conversation's turns, how many bodies were
        captured, the largest differences of logits and scores, and ``passed``.
    """
    reference, graphed, eager = (_model(name, where) for where in (torch.device("cpu"), device, device))
    with_kv_pools(graphed)
    vars(eager.torch_backend.runner)["graph_runner"] = None
    ids = random_prompt(reference, prompt)
    answers = [_greedy(model, ids, tokens) for model in (reference, graphed, eager)]
    others = [random_prompt(reference, prompt, seed) for seed in range(1, AT_ONCE + 1)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        at_once = list(pool.map(lambda each: _greedy(graphed, each, tokens), others))
    paths = [_path(model, ids, answers[0]) for model in (reference, graphed, eager)]
    differences = {
        "logits_to_cpu": _largest(paths[1], paths[0], "logits"),
        "logits_to_eager": _largest(paths[1], paths[2], "logits"),
        "head_scores_to_cpu": _largest(paths[1], paths[0], "head"),
        "activated_scores_to_cpu": _largest(paths[1], paths[0], "activated"),
    }
    talks = [_conversation(model, ids) for model in (reference, graphed, eager)]
    equal = answers[0] == answers[1] == answers[2]
    equal_in_turns = talks[0] == talks[1] == talks[2]
    equal_at_once = at_once == [_greedy(reference, each, tokens) for each in others]
    graphs = (
        graphed.torch_backend.runner.graph_runner is not None and not graphed.torch_backend.runner.graph_runner.failed
    )
    return {
        "model": name,
        "tokens_equal": equal,
        "tokens_equal_at_once": equal_at_once,
        "tokens_equal_in_turns": equal_in_turns,
        "graphs": graphs,
        "captured": graphed.torch_backend.runner.graph_runner.captured
        if graphed.torch_backend.runner.graph_runner is not None
        else {},
        "largest_difference": differences,
        "passed": equal and equal_at_once and equal_in_turns and graphs and max(differences.values()) <= TOLERANCE,
    }


def with_kv_pools(model: LanguageModel) -> None:
    """On the CPU, too, steps go over KV of fixed capacity, without capture; on CUDA they do so by themselves."""
    backend = model.torch_backend
    if model.device.type == "cpu" and backend.runner.decoder_batch is not None:
        backend.use_graphs(GraphRunner(backend.runner.decoder_batch, played))


def models() -> list[str]:
    """All that are compared."""
    return [*FAMILIES, SLM]


def _model(name: str, device: torch.device) -> LanguageModel:
    if name in FAMILIES:
        tiny = tiny_model(name, **FAMILIES[name])
        model = LanguageModel(tiny.model.to(device), tiny.tokenizer, name=name)
    else:
        model = LanguageModel.load(name, device=device, dtype=torch.float32)
    model.backend.eos_ids = frozenset()
    return model


def _greedy(model: LanguageModel, ids: list[int], tokens: int) -> list[int]:
    return [step.token_id for step in Engine(model).steps(ids, Sampling(max_tokens=tokens))]


def _conversation(model: LanguageModel, ids: list[int]) -> list[list[int]]:
    """Answers of a conversation long enough for its turns to be read by graphs."""
    said: list[list[int]] = []
    for turn in range(OFTEN + 2):
        ids = [*ids, *random_prompt(model, 20, seed=100 + turn)]
        said.append(_greedy(model, ids, 4))
        ids = [*ids, *said[-1]]
    return said


def _path(model: LanguageModel, ids: list[int], answer: list[int]) -> list[dict[str, torch.Tensor]]:
    """Logits and scores at every token of an answer, with the same random selectors on every device."""
    prefix, found = TokenSequence(model), []
    prefix.append(ids)
    scorers = _trained(model)
    for token in answer:
        prefix.append([token])
        proposal = Proposal(prefix, 8)
        scores = {kind: selector.scores(proposal).cpu() for kind, selector in scorers.items()}
        found.append({"logits": prefix.logits.cpu(), **scores})
    return found


def _trained(model: LanguageModel) -> dict[str, Selector]:
    """Selectors that do say something: their zeros replaced, drawn on the CPU so that they are the same everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = selectors(model)
        for selector in made.values():
            assert isinstance(selector, torch.nn.Module)
            for weight in selector.requires_grad_(False).parameters():
                weight.copy_(0.05 * torch.randn(weight.shape))
    return made


def _largest(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]], what: str) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((one[what] - other[what]).abs().max()) for one, other in pairs)
