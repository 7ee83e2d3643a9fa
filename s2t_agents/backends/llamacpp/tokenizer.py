"""The tokenizer that a GGUF file describes, as a fast Hugging Face tokenizer: grammars and safe encoding need one.

The file holds the vocabulary, the merges or scores, and the *name* of the rule that splits text before merging. These
rules are the tokenizers' own, by the names that llama.cpp gives them. transformers reads GGUF tokenizers as well: for
fewer architectures, without the rules of several families, and in seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ...errors import ConfigError, S2TError, UnsafeWeights, first_line, is_rust_panic
from .gguf_header import GGUFHeader

_NUMBERS = r"\p{N}{1,3}"
_DIGIT = r"\p{N}"
_CJK = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_QWEN35 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = f"{_CASES[0]}{_ENDINGS}?|{_CASES[1]}{_ENDINGS}?|{_NUMBERS}{_REST_SLASH}"
_TEKKEN = f"{_CASES[0]}|{_CASES[1]}|{_DIGIT}{_REST_SLASH}"
_DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)

_FAMILIES: Mapping[tuple[str, ...], str] = {
    (_LLAMA3,): "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe chatglm-bpe glm4 "
    "glm5",
    (_QWEN2,): "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2",
    (_QWEN35,): "qwen35",
    (_DIGIT, _GPT2): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    (_GPT2,): "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum",
    (_NUMBERS, _CJK, _DEEPSEEK3): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    (_TEKKEN,): "tekken",
    (_GPT4O,): "gpt-4o llama4 kanana2 talkie minimax-m2",
}
SPLITS: Mapping[str, tuple[str, ...]] = {name: rules for rules, names in _FAMILIES.items() for name in names.split()}
"""Regular expressions that split text one after the other, by llama.cpp's name of the rule."""

WHOLE_WORDS = {*_FAMILIES[_LLAMA3,].split(), "tekken"} - {"dbrx", "smaug-bpe", "chatglm-bpe"}
"""Rules whose vocabularies hold words that no merges lead to."""

BEGUN = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
"""Rules whose texts begin with BOS where the file does not say."""

COMPOSED = {"qwen2", "deepseek-r1-qwen", "qwen35"}
"""Rules of tokenizers that compose characters first (NFC); llama.cpp does not."""

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
"""Types of tokens that are no ordinary text."""

DEFAULT_IDS: Mapping[str | None, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "gpt2": {"bos": 11, "eos": 11},
}
"""What llama.cpp takes for tokens that a file does not name, by its kind of tokenizer."""

STRIPPED_AFTER = ("phi-3", "phi3")
"""In a model's name: white space after marked tokens is dropped. No key of a file says so, and llama.cpp goes by the
name, too; the others that it knows are encoders'."""

NOT_STRIPPED_AFTER = ("<unk>", "<s>", "<|endoftext|>")
"""But not after these."""

SPACE = "▁"
"""What sentencepiece writes for a space."""

PROBE = (
    "Hello, world!  It's 3.14, isn't it?\n\n\tdef f(x):\n        return x ** 2  # 12345 67\r\n"
    "naïve café \u2013 “quotes” … ¿qué? Привет мир 你好\uff0c世界 こんにちは 😀👍🏽 \u00a0x  1,000  \n \n "
    "{\"a\": [1, null]} </p> I'LL we've"
)
"""Text on which two tokenizers that differ most likely show it."""

MOST_PROBED = 8192
"""Characters for marked tokens beside it: llama.cpp looks for each of a vocabulary's in turn (6,000 in Gemma's)."""

_WAY_OUT = 'Give the tokenizer of the original model: model_kwargs={"tokenizer": AutoTokenizer.from_pretrained(...)}.'


def read_tokenizer(header: GGUFHeader) -> Any:
    """The fast tokenizer of a GGUF file, with its chat template if it has one.

    Raises:
        ConfigError: a kind of tokenizer that cannot be rebuilt from the file.
        UnsafeWeights: vocabulary and merges that make no tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    kind = header.text("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            core = _byte_level(header)
        elif kind in ("llama", "gemma4"):
            core = _sentencepiece(header)
        else:
            raise ConfigError(f"{str(header.path)!r} has a tokenizer of the kind {kind!r}.", hint=_WAY_OUT)
        _add_marked(core, header)
        core.post_processor = _frame(header)
        names = {name: _token_id(header, key) for name, key in _NAMED.items()}
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            chat_template=_templates(header),
            model_max_length=header.number(f"{header.architecture}.context_length"),
            clean_up_tokenization_spaces=False,
            **{name: header.tokens[token] for name, token in names.items() if token is not None},
        )
    except S2TError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_rust_panic(error)):
            raise
        raise UnsafeWeights(
            f"the tokenizer of {str(header.path)!r} cannot be read: {first_line(error):.300}.",
            hint="Copy or download it again.",
        ) from error


def _templates(header: GGUFHeader) -> str | dict[str, str] | None:
    """The chat template; several by name, such as ``tool_use``, where the file has them."""
    key = "tokenizer.chat_template"
    own = header.text(key)
    named = {name[len(key) + 1 :]: text for name in header.metadata if name.startswith(f"{key}.")
             and (text := header.text(name)) is not None}  # fmt: skip
    return {**({} if own is None else {"default": own}), **named} if named else own


_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _byte_level(header: GGUFHeader) -> Tokenizer:
    """GPT-2's kind: merges over bytes."""
    rule = header.text("tokenizer.ggml.pre") or "default"
    if rule not in SPLITS:
        raise ConfigError(
            f"{str(header.path)!r} splits text by the rule {rule!r}, which is not known here.", hint=_WAY_OUT
        )
    core = Tokenizer(models.BPE(vocab=_vocabulary(header), merges=_merges(header), ignore_merges=rule in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in SPLITS[rule]]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    if rule in COMPOSED:
        core.normalizer = normalizers.NFC()
    return core


def _sentencepiece(header: GGUFHeader) -> Tokenizer:
    """Llama-2's and Gemma's kind: merges over characters, bytes for what is none of them."""
    vocabulary = {_spelled(piece): token for piece, token in _vocabulary(header).items()}
    if "tokenizer.ggml.merges" in header.metadata:
        merges = _merges(header)
    else:
        merges = merges_of(vocabulary, _ranks(header, vocabulary))
    unknown = _token_id(header, "unknown")
    core = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=None if unknown is None else _spelled(header.tokens[unknown]),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begins = header.metadata.get("tokenizer.ggml.add_space_prefix", header.text("tokenizer.ggml.model") == "llama")
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if begins:
        spaces, parts = [normalizers.Prepend(SPACE), *spaces], [*parts, decoders.Strip(" ", 1, 0)]
    core.normalizer, core.decoder = normalizers.Sequence(spaces), decoders.Sequence(parts)
    return core


def _frame(header: GGUFHeader) -> processors.TemplateProcessing:
    """BOS before and EOS after every text, as the file says; where it does not, as llama.cpp takes it."""
    kind, said = header.text("tokenizer.ggml.model"), header.metadata.get
    begun = said("tokenizer.ggml.add_bos_token", kind == "llama" or header.text("tokenizer.ggml.pre") in BEGUN)
    wanted = {"bos": begun or kind == "gemma4", "eos": said("tokenizer.ggml.add_eos_token")}
    found = {name: _token_id(header, name) for name, true in wanted.items() if true}
    added = {name: token for name, token in found.items() if token is not None}
    return processors.TemplateProcessing(
        single=[*(["bos"] if "bos" in added else []), "$A", *(["eos"] if "eos" in added else [])],
        special_tokens=[
            {"id": name, "ids": [token], "tokens": [header.tokens[token]]} for name, token in added.items()
        ],
    )


def _vocabulary(header: GGUFHeader) -> dict[str, int]:
    """Ids by token, without those that only fill the vocabulary up."""
    kinds = _kinds(header)
    return {token: i for i, token in enumerate(header.tokens) if token and kinds.get(i) != UNUSED}


def _kinds(header: GGUFHeader) -> dict[int, int]:
    """Types of the tokens, by id."""
    return dict(enumerate(map(int, header.metadata.get("tokenizer.ggml.token_type", ()))))  # type: ignore[arg-type]


def _merges(header: GGUFHeader) -> list[tuple[str, str]]:
    found = header.metadata.get("tokenizer.ggml.merges")
    if not isinstance(found, list):
        raise ValueError("it has no merges")
    pairs = [(merge, merge.find(" ", 1)) for merge in found]
    return [(merge[:at], merge[at + 1 :]) for merge, at in pairs if at > 0]


def _ranks(header: GGUFHeader, vocabulary: Mapping[str, int]) -> Mapping[str, float]:
    """Which pieces are made first, the highest first: by score; Gemma's follow their order in the vocabulary."""
    scores = header.metadata.get("tokenizer.ggml.scores")
    if header.architecture.startswith("gemma") or scores is None:
        return {piece: -token for piece, token in vocabulary.items()}
    return {piece: float(scores[token]) for piece, token in vocabulary.items()}  # type: ignore[index]


def merges_of(vocabulary: Mapping[str, int], ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that a vocabulary with ranks stands for: every way to make a piece of two, best first."""
    merges = []
    for piece in sorted(vocabulary, key=lambda each: -ranks[each]):
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        made = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(made, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _spelled(piece: str) -> str:
    """A sentencepiece as its own tokenizer spells it: llama.cpp's converter writes runs of spaces as they are."""
    return SPACE * len(piece) if piece and not piece.strip(" ") else piece


def _token_id(header: GGUFHeader, name: str) -> int | None:
    """The id of a named token: the file's, or llama.cpp's default where that is no ordinary text."""
    named = header.token_id(name)
    default = DEFAULT_IDS.get(header.text("tokenizer.ggml.model"), {}).get(name)
    if named is None and default is not None and _kinds(header).get(default) in (UNKNOWN, CONTROL, USER_DEFINED):
        return default
    return named


def _add_marked(core: Tokenizer, header: GGUFHeader) -> None:
    """Control tokens, and those that are found in text whatever stands beside them."""
    special = {_token_id(header, key) for key in ("bos", "eos", "eot", "eom", "padding")}
    spelled = str if header.text("tokenizer.ggml.model") == "gpt2" else _spelled
    strips = any(each in (header.text("general.name") or "").lower() for each in STRIPPED_AFTER)
    marked = []
    for i, kind in _kinds(header).items():
        token, is_special = header.tokens[i], kind in (UNKNOWN, CONTROL) or i in special
        if token and (is_special or kind == USER_DEFINED):
            rstrip = strips and token not in NOT_STRIPPED_AFTER
            marked.append(AddedToken(spelled(token), special=is_special, normalized=False, rstrip=rstrip))
    core.add_tokens(marked)


def probe(header: GGUFHeader, ends: Collection[int]) -> str:
    """``PROBE``, then marked tokens of a file between words and white space.

    Args:
        header: of the file.
        ends: tokens that end an answer, whatever the file has them as; they come first.
    """
    marked = [i for i, kind in _kinds(header).items() if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    tokens = [header.tokens[i] for i in dict.fromkeys([*sorted(ends), *marked])]
    among_words = "".join(f" a \n{token} \n a" for token in tokens if token and token == token.strip())
    return PROBE + among_words[:MOST_PROBED]
