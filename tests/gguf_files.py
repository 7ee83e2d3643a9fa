"""Small GGUF files with random weights: the llama architecture, or Gemma 3's, over ``tiny_tokenizer``'s bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s2t_agents.testing import CHATML, tiny_tokenizer

MERGED = "th"
"""The one token that is no byte: llama.cpp wants a merge."""

WIDTH, HEADS, KV_HEADS, INNER, WINDOW = 64, 4, 2, 128, 512


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    seed: int = 0,
    layers: int = 2,
    kind: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    keys: Mapping[str, str | int | float] | None = None,
    types: Mapping[str, int] | None = None,
    eos: str = "<|im_end|>",
    vectors: Mapping[str, Sequence[float]] | None = None,
    without: tuple[str, ...] = (),
    template: str | Sequence[Mapping[str, str]] | None = CHATML,
    weights: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values,
) -> Path:
    """A model of ``layers`` layers, its matrices of the ggml type ``kind``.

    Args:
        path: of the file.
        architecture: by llama.cpp's name; ``gemma3`` has more norms, and no output layer of its own.
        seed: of the weights.
        layers: how many.
        kind: a type that ``gguf.quants`` can quantise to.
        metadata: keys, without the architecture's name, that get another value; None leaves one out.
        keys: further ones, with their whole names.
        types: of tokens, where they are others.
        eos: the end of a text.
        vectors: further tensors.
        without: tensors to leave out.
        template: the chat template, or several with names.
        weights: changes a tensor before it is quantised.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), MERGED]
    control = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", *(t for t in tokens if t.startswith(("<tool", "</tool")))}
    kinds = {token: 3 if token in control else 1 for token in tokens} | (types or {})
    numbers = {
        "context_length": WINDOW,
        "embedding_length": WIDTH,
        "block_count": layers,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": WIDTH // HEADS,
        "vocab_size": len(tokens),
        **(metadata or {}),
    }
    for name, value in numbers.items():
        if isinstance(value, bool):
            writer.add_bool(f"{architecture}.{name}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{name}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{name}", value)
    for name, value in (keys or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(name, value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[token] for token in tokens])
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_eos_token_id(vocabulary[eos])
    writer.add_pad_token_id(vocabulary["<|endoftext|>"])
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    for name, vector in (vectors or {}).items():
        writer.add_tensor(name, np.array(vector, dtype=np.float32))
    draw = np.random.default_rng(seed)
    for name, shape in shapes(layers, len(tokens), architecture).items():
        if name in without:
            continue
        if len(shape) == 1:
            writer.add_tensor(name, weights(name, np.ones(shape, dtype=np.float32)))
            continue
        values = weights(name, draw.normal(0, 0.2, shape).astype(np.float32))
        sort = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, sort), raw_dtype=sort)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes(layers: int, tokens: int, architecture: str = "llama") -> dict[str, tuple[int, ...]]:
    """The tensors of such a model, rows first as numpy has them."""
    narrow = WIDTH // HEADS * KV_HEADS
    layer = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (narrow, WIDTH),
        "attn_v": (narrow, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    if architecture == "gemma3":
        head = WIDTH // HEADS
        layer |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
        layer |= {"post_attention_norm": (WIDTH,), "post_ffw_norm": (WIDTH,)}
    blocks = {f"blk.{at}.{name}.weight": shape for at in range(layers) for name, shape in layer.items()}
    whole = {"token_embd.weight": (tokens, WIDTH), "output_norm.weight": (WIDTH,), "output.weight": (tokens, WIDTH)}
    if architecture == "gemma3":
        del whole["output.weight"]
    return whole | blocks


def split_gguf(folder: Path, parts: int = 3) -> list[Path]:
    """The same tensors in several files, as llama.cpp's own tool splits them."""
    import gguf

    whole = gguf.GGUFReader(write_gguf(folder / "whole.gguf"))
    files = []
    for number in range(parts):
        file = folder / f"tiny-{number + 1:05d}-of-{parts:05d}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        for field in whole.fields.values() if number == 0 else ():
            if field.name.startswith(("GGUF.", "general.architecture")):
                continue
            if field.types[0] == gguf.GGUFValueType.ARRAY:
                if field.contents():
                    writer.add_array(field.name, field.contents())
            else:
                writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for at, each in enumerate(whole.tensors):
            if at % parts == number:
                writer.add_tensor(each.name, each.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(file)
    return files
