"""A conversation as a judge reads it: nothing that was said in it can pass for the end of a turn.

Texts stand as JSON strings; control tokens, which no text from outside ever becomes, stand bare between them:
``<|im_start|>"user\\nHi<|im_end|>"<|im_end|>`` is a user who typed the spelling of a control token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any


def transcript(tokenizer: Any, ids: Sequence[int], limit: int) -> str:
    """The end of a conversation.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        ids: the conversation, as token ids.
        limit: characters that are shown, the last ones; quotes and what JSON escapes are not counted.
    """
    control = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    runs = [(bare, str(tokenizer.decode(list(run)))) for bare, run in groupby(ids, key=control.__contains__)]
    parts: list[str] = []
    for bare, text in reversed(runs):
        if limit <= 0:
            break
        shown = text[-limit:]
        parts.append(shown if bare else json.dumps(shown, ensure_ascii=False))
        limit -= len(text)
    return "".join(reversed(parts))
