"""One new token for each of several sequences, written out for models of the Llama pattern.

The same arithmetic on the same weights as transformers' modules, without the modules: on a small model most of a step
is their overhead. Used for single tokens only (prompts are bound by arithmetic), only for architectures known here, and
only after it has given the same logits as the model itself; everything else goes the model's own way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .kv import KVCache
from .lora import LoraLayer, corrections_of
from .overlay import layer_kinds

PATTERN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
"""Architectures: RMS norm before attention and MLP, rotary positions, gated SiLU, no other twist."""

FIXED_ROTATIONS = {"default", "linear", "llama3"}
"""Rotary embeddings whose angles depend on the position alone."""

CLOSE = 1e-3
"""Largest difference to the model's own logits, as a share of their range, at the first use."""


class Attention(Protocol):
    """Lets new tokens look at the keys and values before them; whether theirs join those is its own affair."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one token per line in one layer.

        Args:
            layer: its index.
            q: ``[N, key heads, queries per key head, d]``: queries that share a key stand in one block, so that
                attention runs on the key heads and nothing is repeated.
            k: ``[N, key heads, 1, d]``.
            v: like k.
            scale: of the scores.
            window: tokens that a token sees, itself included; None for all.

        Returns:
            Shaped as q.
        """
        ...


class GrowingAttention:
    """Over KV that grows by the token, sequence by sequence."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self._caches = caches

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See ``Attention``; keys and values join the caches."""
        out = []
        for row, cache in enumerate(self._caches):
            keys, values = cache.layers[layer].update(k[row : row + 1], v[row : row + 1])
            if window is not None:
                keys, values = keys[..., -window:, :], values[..., -window:, :]
            out.append(functional.scaled_dot_product_attention(q[row : row + 1], keys, values, scale=scale))
        return out[0] if len(out) == 1 else torch.cat(out)


class LeanLayer:
    """One decoder layer's weights."""

    def __init__(self, layer: Any, window: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.q, self.k, self.v, self.o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.gate, self.up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.head_dim, self.scale, self.window = attention.head_dim, attention.scaling, window

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, index: int, linear: Linear) -> Tensor:
        """Attention of one token per line, ``[N, H]`` to ``[N, H]``."""
        n, d = x.shape[0], self.head_dim
        q, k = linear(self.q, x).view(n, -1, d), linear(self.k, x).view(n, -1, d)
        v = linear(self.v, x).view(n, -1, 1, d)
        if self.q_norm is not None:
            q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)[:, :, None]
        seen = attention(index, q.view(n, k.shape[1], -1, d), k, v, self.scale, self.window)
        return linear(self.o, seen.reshape(n, -1))

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, index: int, linear: Linear) -> Tensor:
        """``[N, H]`` to ``[N, H]``."""
        x = x + self.attend(normed(self.before, x), cos, sin, attention, index, linear)
        y = normed(self.between, x)
        return x + linear(self.down, functional.silu(linear(self.gate, y)) * linear(self.up, y))


class LeanStep:
    """The decoder and output layer of one model.

    Args:
        model: a causal LM of a known architecture; see ``lean_step_of``.
    """

    def __init__(self, model: Any) -> None:
        decoder, config = model.get_decoder(), model.config
        self._embed, self._norm, self._head = decoder.embed_tokens, decoder.norm, model.get_output_embeddings()
        self._rotary = decoder.rotary_emb
        window = getattr(config, "sliding_window", None)
        kinds = layer_kinds(config)
        self._layers = [
            LeanLayer(layer, window if kind == "sliding_attention" else None)
            for layer, kind in zip(decoder.layers, kinds, strict=True)
        ]
        self._modules = list(decoder.modules())
        self._angles: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self._layers)

    @property
    def free(self) -> bool:
        """Nobody has put a hook on the decoder, which going past its modules would miss."""
        return not any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)

    @property
    def corrections(self) -> dict[nn.Module, list[LoraLayer]] | None:
        """The LoRA corrections that are on now; None where anybody else has a hook on the decoder."""
        found = {}
        for module in self._modules:
            if module._forward_hooks or module._forward_pre_hooks:
                layers = corrections_of(module)
                if layers is None:
                    return None
                found[module] = layers
        return found

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Sequence[int], caches: Sequence[KVCache]) -> tuple[Tensor, Tensor]:
        """Append one token to each sequence.

        Args:
            ids: ``[N]``.
            positions: tokens in each cache.
            caches: grow by one token.

        Returns:
            Logits ``[N, V]`` (fp32) and last hidden states ``[N, H]``.
        """
        hidden = self.through(ids, *self._rotations(positions), GrowingAttention(caches), linear)
        return self.logits(hidden), hidden

    def through(self, ids: Tensor, cos: Tensor, sin: Tensor, attention: Attention, linear: Linear) -> Tensor:
        """All layers and the last norm, over whatever KV the attention knows.

        Args:
            ids: ``[N]``.
            cos: ``[N, 1, d]``, of each token's position; or ``[1, 1, d]`` where all stand at one.
            sin: like cos.
            attention: what the tokens see.
            linear: how a linear module is applied.

        Returns:
            Last hidden states ``[N, H]``.
        """
        x = functional.embedding(ids, self._embed.weight)
        for index, layer in enumerate(self._layers):
            x = layer(x, cos, sin, attention, index, linear)
        return normed(self._norm, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[N, H]`` to ``[N, V]`` (fp32)."""
        return linear(self._head, hidden).float()

    def rotation_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[L, 1, d]`` of at least so many positions, filled by the model's own rotary module."""
        if length > len(self._angles[0]):
            like = self._embed.weight
            cos, sin = self._rotary(like, torch.arange(max(1024, 2 * length), device=like.device)[None])
            self._angles = cos[0, :, None], sin[0, :, None]
        return self._angles

    def _rotations(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[N, 1, d]``."""
        cos, sin = self.rotation_table(max(positions) + 1)
        if len(positions) == 1:
            at = positions[0]
            return cos[at : at + 1], sin[at : at + 1]
        rows = torch.tensor(positions, device=cos.device)
        return cos[rows], sin[rows]


Linear = Callable[[Any, Tensor], Tensor]
"""How a linear module is applied to ``[N, in]``: as it is, or with corrections."""


def linear(module: Any, x: Tensor) -> Tensor:
    """The module's affine map."""
    return functional.linear(x, module.weight, module.bias)


def linear_with(corrections: Mapping[nn.Module, Sequence[LoraLayer]]) -> Linear:
    """The affine map and what the corrections add to it."""

    def corrected(module: Any, x: Tensor) -> Tensor:
        y = linear(module, x)
        for layer in corrections.get(module, ()):
            y = y + layer(x)
        return y

    return corrected


def normed(module: Any, x: Tensor) -> Tensor:
    """RMS norm over the last dimension, with the module's weight."""
    return functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on ``[N, heads, d]``."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def lean_step_of(model: Any) -> LeanStep | None:
    """The lean step of a model, if it has one: a known architecture, plain layers, and the same logits in a trial."""
    if type(model).__name__ not in PATTERN or not _plain(model):
        return None
    step = LeanStep(model)
    return step if _agrees(model, step) else None


def _plain(model: Any) -> bool:
    """Whether every layer is what the pattern says: no quantised or replaced modules, fixed rotations."""
    config, decoder = model.config, model.get_decoder()
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    linears = [m for layer in decoder.layers for m in layer.modules() if hasattr(m, "in_features")]
    return (
        rotation in FIXED_ROTATIONS
        and config.hidden_act == "silu"
        and all(type(module) is nn.Linear for module in [*linears, model.get_output_embeddings()])
        and not getattr(config, "output_attentions", False)
        and len({weight.device for weight in model.parameters()}) == 1
    )


@torch.inference_mode()
def _agrees(model: Any, step: LeanStep) -> bool:
    """One token after three, both ways."""
    ids = torch.tensor([[1, 2, 3, 4]], device=model.device) % model.get_input_embeddings().weight.shape[0]
    cache = KVCache()
    model(input_ids=ids[:, :3], past_key_values=cache, use_cache=True, logits_to_keep=1)
    ours, _ = step(ids[0, 3:], [3], [cache])
    cache.crop(-1)
    theirs = model(input_ids=ids[:, 3:], past_key_values=cache, use_cache=True).logits[:, -1].float()
    return close(ours, theirs, model.dtype)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways of computing logits in ``dtype`` say the same."""
    span = 1.0 if dtype == torch.float32 else 30.0  # half precision rounds at other places
    return bool((ours - theirs).abs().max() <= span * CLOSE * (theirs.max() - theirs.min()))
