"""What of a checkpoint is not followed here though it would change answers: told once, when it is loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT = re.compile(
    r"(inv_freq|(cos|sin)_cached|position_ids|rope\.freqs|causal_mask|embed_positions|image_newline|[kv]_scale)$"
    r"|(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)(mlp1|vpm|apm|resampler|connector|talker|v_head|medusa_head)\."
    r"|(^|\.)(embed_)?(mtp|nextn|vision|visual|image|img|audio|speech|video|multi_?modal|mm_)\w*\."
)
"""Tensors that a causal LM of text may leave out: computed tables, drafts of later tokens, heads, eyes and ears."""

_DRAFTING = re.compile(r"(.*\blayers\.\d+\.)(eh_proj|enorm|hnorm|shared_head)\b")
"""A layer behind the last one that drafts later tokens (DeepSeek, GLM)."""

NAMED = 3
"""Tensors that a warning names."""

_UNFOLLOWED: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "repetition_penalty": (1,),
    "sequence_bias": ([], {}),
    "stop_strings": ([], ""),
    "suppress_tokens": ([],),
    "watermarking_config": (),
}
"""Settings of a generation config that would change greedy answers, too, with the values that change none."""


def tell_left_out(name: str, model: Any, tensors: Sequence[str]) -> None:
    """Warn of tensors that the model's class has no place for, but of those without an effect.

    Args:
        name: of the model, for the warning.
        model: as it was loaded.
        tensors: in its files and not in it.
    """
    drafting = tuple({found[1] for each in tensors if (found := _DRAFTING.match(each))})
    tied = "lm_head.weight" if getattr(model.config.get_text_config(), "tie_word_embeddings", False) else ()
    counting = [each for each in tensors if not (_WITHOUT_EFFECT.search(each) or each.startswith(drafting))]
    lost = [each for each in counting if not each.endswith(tied)]
    if lost:
        logger.warning(
            "%s has no place for %d tensors of the weights at %r and leaves them out: %s%s. Its answers are not those "
            "of its makers unless config and weights are of one model.",
            type(model).__name__, len(lost), name, ", ".join(f"{each!r:.100}" for each in lost[:NAMED]),
            ", ..." if len(lost) > NAMED else "",
        )  # fmt: skip


def tell_unfollowed(name: str, generation: Any) -> None:
    """Warn of settings that change which token is the next one even without sampling, or where an answer ends.

    Args:
        name: of the model, for the warning.
        generation: its generation config; None has none.
    """
    given = {each: getattr(generation, each, None) for each in _UNFOLLOWED}
    wanted = [f"{key}={value!r:.60}" for key, value in given.items()
              if value is not None and value not in _UNFOLLOWED[key]]  # fmt: skip
    if wanted:
        logger.warning(
            "the generation config of %r sets %s: not followed here, so that answers may differ from other engines'.%s",
            name, ", ".join(wanted), " Stop strings are given as stop=[...]." if given["stop_strings"] else "",
        )  # fmt: skip
