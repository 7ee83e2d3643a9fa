"""Problems whose tool call creates a record: a quoted name in any script, asked and documented in many ways."""

from __future__ import annotations

from random import Random

from .lexicon import LANGUAGES, WORDS, foreign, made_up, span
from .schemas import ParameterType

_VERBS = ("create", "make", "add", "register", "open", "enter", "store", "list", "note")
_NOUNS = ("client", "company", "account", "user", "shop", "firm", "member", "guest", "customer", "school", "band")
_NAME_KEYS = ("{0}_name", "{0}_name", "name", "full_name", "title", "{0}", "label")
_NOTE_KEYS = ("description", "about", "note", "details", "info")
_NAMED = ("named", "called", "with the name", "by the name of", "-")


class RecordProblem:
    """One record to create, in its parts.

    Attributes:
        name: of the tool.
        description: of the tool, in a sentence.
        values: the right arguments.
        question: what the user says.
    """

    def __init__(self, rng: Random) -> None:
        verb, noun = rng.choice(_VERBS), rng.choice(_NOUNS)
        if (verb, noun) == ("create", "customer"):  # the standard suite's words: they stay unseen
            noun = "member"
        front = rng.choice((verb, verb, made_up(rng), rng.choice(WORDS)))
        self.name = rng.choice((f"{front}_{noun}", f"{front}_{noun}", f"{noun}_{front}"))
        self.description = rng.choice((f"{verb.capitalize()} a {noun}.", f"Tool for a {noun}.", f"Use it to {verb}."))
        name_key, note_key = rng.choice(_NAME_KEYS).format(noun), rng.choice(_NOTE_KEYS)
        who, note = _name(rng), _note(rng, noun)
        self.values: dict[str, str | int] = {name_key: who}
        said = f"{verb.capitalize()} {rng.choice(('a', 'the', 'a new'))} {noun} {rng.choice(_NAMED)} '{who}'"
        if rng.random() < 0.5:
            said += f" ({_latin(rng)})"
        if rng.random() < 0.7:
            said += rng.choice((" - {}", " - {}", ", {}", ": {}")).format(note)
            if rng.random() < 0.6:
                self.values[note_key] = note
        self.question = said + rng.choice(("", "", "."))


def _name(rng: Random) -> str:
    """Mostly one span of another script, sometimes two, sometimes known words."""
    luck = rng.random()
    if luck < 0.6:
        return foreign(rng)
    return foreign(rng) + foreign(rng) if luck < 0.85 else span(rng)


def _latin(rng: Random) -> str:
    """What stands in brackets after a name."""
    words = (rng.choice((rng.choice(WORDS), made_up(rng))).capitalize() for _ in range(rng.randint(1, 2)))
    return " ".join(words)


def _note(rng: Random, noun: str) -> str:
    """A short description."""
    kind = rng.choice((noun, "company", "group", rng.choice(WORDS)))
    return f"a {rng.choice((rng.choice(LANGUAGES), rng.choice(WORDS)))} {rng.choice(WORDS)} {kind}"


def documented(rng: Random, description: str, types: dict[str, ParameterType]) -> str:
    """A description as a docstring has it: the sentence, then often its arguments and what it returns."""
    if not types or rng.random() < 0.6:
        return description
    said = [f"    {key}: {rng.choice(('The', 'A', 'One'))} {rng.choice((key, rng.choice(WORDS)))}." for key in types]
    lines = [description, "", "Args:", *said]
    if rng.random() < 0.5:
        lines += ["", "Returns:", f"    {rng.choice(('A', 'The'))} {rng.choice(WORDS)} {rng.choice(WORDS)}."]
    return "\n".join(lines)
