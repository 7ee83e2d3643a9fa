"""Chat templates in the style of six model families, each with a small tokenizer of that family's make.

The templates are written by hand after the public conventions of each family: same control tokens, same roles,
same quirks (who refuses a system turn, who wants call ids of nine characters, who speaks which tool dialect).
"""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
CORPUS = [
    "The weather in Paris is sunny today, and the tool said so.",
    "user system assistant tool content name arguments end start turn",
    '{"name": "weather", "arguments": {"city": "Paris", "days": 3}}',
    "Das Wetter in Zürich: 21 °C.\n\nMany words, some    spaces,\n  and lines.",
    "天気はどうですか。 今日は晴れです。",
]
FAMILIES = ("qwen2_5", "qwen3", "llama3", "mistral", "gemma", "phi3", "unigram")
SPEAKS_HERMES = ("qwen2_5", "qwen3")

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return core


def _sentence_pieces(own_tokens):
    """BPE over pieces with byte fallback; the control tokens stand in the model's vocabulary, as in the real ones."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *own_tokens, *BYTE_TOKENS], show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core = Tokenizer(core.model)  # training made all of them added tokens; byte tokens must not be
    core.add_special_tokens(["<unk>", *own_tokens])
    return core


def _qwen2_5():
    core = _byte_level()
    core.normalizer = normalizers.NFC()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    core.add_tokens([AddedToken(t, normalized=False) for t in ("<tool_call>", "</tool_call>", "<|fim_prefix|>")])
    return core, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _qwen3():
    core, names = _qwen2_5()
    more = ("<tool_response>", "</tool_response>", "<think>", "</think>")
    core.add_tokens([AddedToken(t, normalized=False) for t in more])
    return core, names


def _llama3():
    core = _byte_level()
    turns = ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    core.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *turns])
    return core, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def _mistral():
    own = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"]
    core = _sentence_pieces([*own, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"])
    core.normalizer = None
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core, {"bos_token": "<s>", "eos_token": "</s>"}


def _gemma():
    core = _sentence_pieces(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"])
    core.normalizer = normalizers.Replace(" ", "▁")
    core.add_tokens([AddedToken(t, normalized=False) for t in ("\n\n", "▁▁", "<table>")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def _phi3():
    core = _sentence_pieces(["<s>", "</s>"])
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    turns = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    core.add_special_tokens([AddedToken(t, normalized=False, rstrip=True) for t in turns])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core, {"bos_token": "<s>", "eos_token": "<|endoftext|>"}


def _unigram():
    """No family's: a Unigram model whose best path would run through a control token that is in its vocabulary."""
    letters = sorted(set("".join(CORPUS)) - {" "})
    pieces = [("<unk>", 0.0), ("[S]", 0.0), ("[/S]", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in letters]
    pieces += [(b, -9.0) for b in BYTE_TOKENS] + [("▁the", -3.0), ("er", -4.0)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    core.add_special_tokens(["<unk>", "[S]", "[/S]"])
    return core, {"eos_token": "[/S]"}


@cache
def family(name):
    """The family's tokenizer with its chat template."""
    core, names = globals()[f"_{name}"]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = (HERE / f"{name}.jinja").read_text()
    return tokenizer
