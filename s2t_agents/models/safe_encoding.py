"""Rendered prompts to token ids, so that text from outside stays text.

A chat template mixes its own control tokens with strings from outside, and a tokenizer cannot tell them apart
afterwards. So strings from outside are *shielded* before the template sees them: the first character of whatever
could become a control token is hidden behind a marker nobody can guess. After rendering:

* what still spells a control token is the template's own;
* each of these is swapped for a stand-in, the markers give their characters back, and a copy of the tokenizer
  that knows the stand-ins in place of the control tokens encodes the whole. In that copy no text from outside
  can match anything, and the tokenizer's rules on spaces next to control tokens apply unchanged.

Without a marker in it (nearly every prompt) the rendered text takes the ordinary way.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..errors import ConfigError, InputError

_HARMLESS = re.compile(r"[\s▁]+|</?[a-z]+[1-6]?>")


def check_text(text: str, where: str) -> str:
    """The text itself, if a tokenizer can read it.

    Raises:
        InputError: a lone surrogate or a NUL character in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds a lone surrogate at character {error.start}: it is not Unicode text.",
            hint='Clean it with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").',
        ) from None
    if (at := text.find("\0")) >= 0:
        raise InputError(
            f"{where} holds a NUL character at position {at}.", hint=r'Clean it with text.replace("\0", "").'
        )
    return text


class SafeEncoder:
    """Shields strings from outside, and encodes what a template made of them.

    Control tokens are all added tokens but the harmless ones: runs of white space and HTML tags that are neither
    special nor named by the chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template: the chat template's source.

    Raises:
        ConfigError: a tokenizer without the ``tokenizers`` library behind it.
    """

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} is not a fast tokenizer.",
                hint="Convert it to tokenizer.json; only these can be encoded safely.",
            )
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        if self._backend.truncation or self._backend.padding:
            self._backend = Tokenizer.from_str(self._backend.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self.control = {i: token for i, token in added.items() if _controls(token, template)}
        self._id_of = {token.content: i for i, token in self.control.items()}
        words = sorted(self._id_of, key=len, reverse=True)
        self._structure = re.compile("|".join(_pattern(self.control[self._id_of[w]]) for w in words) or r"(?!)")
        self._anywhere = re.compile(f"(?=(?:{'|'.join(map(re.escape, words)) or '(?!)'}))")
        self._heads = {word[:end] for word in words for end in range(1, len(word))}
        self._tails = {word[start:] for word in words for start in range(1, len(word))}
        self._longest = max(map(len, words), default=0)
        self._joined = "\0".join(words)
        self._mark = f"\ue000{secrets.randbelow(10**18):018d}\ue001"
        self._marked = re.compile(re.escape(self._mark) + "([0-9]+)\ue002")

    def shield(self, value: Any, where: str = "A message") -> Any:
        """The value with every string in it, keys too, made unable to form a control token.

        Raises:
            InputError: text that no tokenizer can read, see ``check_text``; a value that is no JSON.
        """
        if isinstance(value, str):
            return self._shield_text(check_text(value, where))
        if isinstance(value, Mapping):
            return {self.shield(key, where): self.shield(item, where) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.shield(item, where) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise InputError(f"{where} holds a {type(value).__name__}, which is no JSON.", hint="Convert it to text.")

    def unshield(self, text: str) -> str:
        """The text with its hidden characters back."""
        return self._marked.sub(lambda match: chr(int(match[1])), text)

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered prompt: its own control tokens, and everything else as text."""
        if self._mark not in rendered:
            ids = list(self._backend.encode(rendered, add_special_tokens=False).ids)
            own = [self._id_of[match[0]] for match in self._structure.finditer(rendered)]
            # a normalizer or the model itself may find control tokens where nobody spelt one
            if [i for i in ids if i in self.control] == own:
                return ids
        copy, stand_ins, ids_back = self._copy
        text = self._structure.sub(lambda match: stand_ins[match[0]], rendered)
        ids = copy.encode(self.unshield(text), add_special_tokens=False).ids
        return [ids_back.get(i, i) for i in ids]

    def fewest_tokens(self, rendered: str) -> int:
        """A number of tokens that the text cannot be encoded in less than, without encoding it."""
        return len(rendered) // self._longest_token

    @cached_property
    def _longest_token(self) -> int:
        return max(len(word) for word in self._backend.get_vocab())

    def _shield_text(self, text: str) -> str:
        hidden = {match.start() for match in self._anywhere.finditer(text)}
        hidden |= self._hidden_at_edges(text)
        if not hidden:
            return text
        parts, last = [], 0
        for at in sorted(hidden):
            parts += [text[last:at], f"{self._mark}{ord(text[at])}\ue002"]
            last = at + 1
        return "".join([*parts, text[last:]])

    def _hidden_at_edges(self, text: str) -> set[int]:
        """Where the template's text beside it, or what is left after trimming, could complete a control token."""
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        inner = text[start:end]
        reach = range(1, min(self._longest, len(inner) + 1))
        hidden = {end - size for size in reach if inner[-size:] in self._heads}
        if inner and (
            any(inner[:size] in self._tails for size in reach) or (len(inner) < self._longest and inner in self._joined)
        ):
            hidden.add(start)
        return hidden

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """A tokenizer with stand-ins for the control tokens, the stand-ins, and its ids where they differ."""
        nonce = secrets.randbelow(10**18)
        stand_ins = {word: f"\ue003{nonce:018d}{i}\ue004" for word, i in self._id_of.items()}
        described = json.loads(self._backend.to_str())
        described["post_processor"] = None
        for token in described["added_tokens"]:
            token["content"] = stand_ins.get(token["content"], token["content"])
        _rename(described["model"], stand_ins)
        vocabulary = described["model"]["vocab"]
        if isinstance(vocabulary, dict):  # so that every added token keeps its id
            vocabulary.update({token["content"]: token["id"] for token in described["added_tokens"]})
        copy = Tokenizer.from_str(json.dumps(described))
        moved = {copy.token_to_id(stand_in): self._id_of[word] for word, stand_in in stand_ins.items()}
        return copy, stand_ins, {new: old for new, old in moved.items() if new != old and new is not None}


def _controls(token: AddedToken, template: str) -> bool:
    named = token.content in template
    return bool(token.content) and (token.special or named or not _HARMLESS.fullmatch(token.content))


def _pattern(token: AddedToken) -> str:
    word = re.escape(token.content)
    return rf"(?<!\w){word}(?!\w)" if token.single_word else word


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename pieces of a serialized model, and forget the merges that would spell the old names."""
    renamed: Callable[[str], str] = lambda piece: names.get(piece, piece)  # noqa: E731
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[renamed(piece), score] for piece, score in vocabulary]
        return
    present = names.keys() & vocabulary.keys()
    model["vocab"] = {renamed(piece): i for piece, i in vocabulary.items()}
    if model.get("unk_token") in present:
        model["unk_token"] = names[model["unk_token"]]
    if present and "merges" in model:
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not present & {*pair, "".join(pair)}]
