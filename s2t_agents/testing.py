"""Public test utilities: tiny models of real architectures with random weights, and a scripted LLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from .budget.charges import charge_for
from .llms.question import Answer, Question
from .scheduling.language_model import LanguageModel
from .types import Charge, Price

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "phi3", "gemma3")
"""Families for which candidate scoring on read-only KV is exact; ``tiny_model`` builds each."""

RECURRENT = ("qwen3_next", "jamba", "bamba")
"""Hybrids of attention and recurrent layers, whose candidates are scored on cloned rows."""

CHATML = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)

_TINY_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}

_ARCHITECTURE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma3": {
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3": {"head_dim": 8},
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 3,
    },
    "bamba": {
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
}

_MODEL_TYPES = {"gemma3": "gemma3_text"}


@cache
def tiny_tokenizer() -> Any:
    """A byte tokenizer with ChatML's control tokens: 256 bytes, then the specials. Every text has an encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
    specials += ["<tool_response>", "</tool_response>"]
    core.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def tiny_config(architecture: str, **overrides: Any) -> Any:
    """A config of the family with 4 layers of width 32 over ``tiny_tokenizer``'s vocabulary."""
    from transformers import AutoConfig

    tokenizer = tiny_tokenizer()
    settings = {"vocab_size": len(tokenizer), **_TINY_SIZES, **_ARCHITECTURE_OPTIONS.get(architecture, {}), **overrides}
    return AutoConfig.for_model(
        _MODEL_TYPES.get(architecture, architecture),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **settings,
    )


def tiny_model(architecture: str = "qwen3", *, seed: int = 0, **overrides: Any) -> LanguageModel:
    """A random model of the family, fp32, on the CPU; the same seed gives the same weights."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides))
    model.eval().requires_grad_(False)
    return LanguageModel(model, tiny_tokenizer(), name=f"tiny-{architecture}-{seed}")


def markov_model(tokenizer: Any, *chains: Sequence[str | int], name: str = "markov") -> LanguageModel:
    """A Qwen3 model whose next token depends on the last one only: ``["a", "b", "c"]`` makes it generate b after a, c
    after b.

    Args:
        tokenizer: of any size; the hidden states have one dimension for each token of the chains.
        chains: token ids, added tokens, or texts, which stand for all their tokens. If two chains disagree on what
            follows a token, the earlier one is more likely, so the later applies only if a grammar forbids that.
        name: of the model.
    """
    from transformers import AutoModelForCausalLM

    added = tokenizer.get_added_vocab()

    def ids_of(part: str | int) -> list[int]:
        if isinstance(part, int):
            return [part]
        return [added[part]] if part in added else list(tokenizer.encode(part, add_special_tokens=False))

    id_chains = [[token for part in chain for token in ids_of(part)] for chain in chains]
    known = sorted({token for chain in id_chains for token in chain})
    width, place = len(known) + -len(known) % 8, {token: at for at, token in enumerate(known)}
    config = tiny_config(
        "qwen3",
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        tie_word_embeddings=False,
        max_position_embeddings=8192,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    layer = model.model.layers[0]
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
        weight.zero_()
    embeddings = model.model.embed_tokens.weight.zero_()
    for token, at in place.items():
        embeddings[token, at] = 1.0
    for rank, chain in enumerate(id_chains):
        for last, following in pairwise(chain):
            row = model.lm_head.weight[following]
            row[place[last]] = max(float(row[place[last]]), 2.0**-rank)
    return LanguageModel(model, tokenizer, name=name)


class ScriptedLLM:
    """An LLM that answers from a function, for tests of faults, counts and order.

    Args:
        answer: from prefix ids and candidate ids to their log-probabilities; may raise ``EscalationFailed``.
        price: of its tokens.
    """

    name = "scripted"

    def __init__(
        self, answer: Callable[[Sequence[int], Sequence[int]], list[float]], *, price: Price | None = None
    ) -> None:
        self.answer, self.price = answer, price
        self.asked: list[tuple[list[int], list[int]]] = []
        self.opened = self.closed = 0

    def check(self, slm: LanguageModel) -> None:
        """Accepts any SLM."""

    def open(self) -> ScriptedLLM:
        """Returns itself as the session; every question costs the whole prefix."""
        self.opened += 1
        return self

    def quote(self, question: Question) -> Charge:
        """The cost of the whole prefix and one output token."""
        return charge_for(self.price, input_tokens=len(question.ids))

    def ask(self, question: Question) -> Answer:
        """Call the function; an answer is charged, a raised error is not."""
        ids, candidates = list(question.ids), list(question.candidates)
        self.asked.append((ids, candidates))
        scores = self.answer(ids, candidates)
        question.owe(self.quote(question))
        return Answer(tuple(scores))

    def close(self) -> None:
        """Count the call."""
        self.closed += 1


def last_candidate(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
    """An answer for ``ScriptedLLM``: always the SLM's least likely candidate."""
    return [-float(len(candidates) - at) for at in range(len(candidates))]
