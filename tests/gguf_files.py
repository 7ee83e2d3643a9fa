"""Small GGUF files with random weights: the llama architecture over ``tiny_tokenizer``'s bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    seed: int = 0,
    layers: int = 2,
    kind: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    template: str | None = CHATML,
    weights: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values,
) -> Path:
    """A model of ``layers`` layers, its matrices of the ggml type ``kind``.

    Args:
        path: of the file.
        seed: of the weights.
        layers: how many.
        kind: a type that ``gguf.quants`` can quantise to.
        metadata: keys, without the architecture's name, that get another value; None leaves one out.
        without: tensors to leave out.
        template: the chat template.
        weights: changes a tensor before it is quantised.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), MERGED]
    control = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", *(t for t in tokens if t.startswith(("<tool", "</tool")))}
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
        if isinstance(value, float):
            writer.add_float32(f"llama.{name}", value)
        elif value is not None:
            writer.add_uint32(f"llama.{name}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|endoftext|>"])
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    draw = np.random.default_rng(seed)
    for name, shape in shapes(layers, len(tokens)).items():
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


def shapes(layers: int, tokens: int) -> dict[str, tuple[int, ...]]:
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
    blocks = {f"blk.{at}.{name}.weight": shape for at in range(layers) for name, shape in layer.items()}
    return {
        "token_embd.weight": (tokens, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (tokens, WIDTH),
    } | blocks
