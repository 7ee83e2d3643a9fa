"""A conversation as text for a judge, cut to a number of characters, in which message text cannot imitate control
tokens.

Text is quoted as JSON strings; control tokens, which text from outside never becomes, are unquoted:
``<|im_start|>"user\\nHi<|im_end|>"<|im_end|>`` is a user who typed the characters of a control token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any


def transcript(tokenizer: Any, ids: Sequence[int], limit: int) -> str:
    """The end of a conversation as text.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        ids: the conversation as token ids.
        limit: maximum number of characters, from the end; quotes and JSON escapes are not counted.
    """
    control = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    runs = [
        (is_control, str(tokenizer.decode(list(run)))) for is_control, run in groupby(ids, key=control.__contains__)
    ]
    parts: list[str] = []
    for is_control, text in reversed(runs):
        if limit <= 0:
            break
        shown = text[-limit:]
        parts.append(shown if is_control else json.dumps(shown, ensure_ascii=False))
        limit -= len(text)
    return "".join(reversed(parts))
