"""New tokens of several sequences, written out for models of the Llama pattern.

The same arithmetic on the same weights as transformers' modules, without the modules: on a small model most of a step
is their overhead, and on a CPU the weights are laid out beforehand and attention is faster. Used for single tokens
and for chunks of up to ``CHUNK`` tokens, only for architectures known here, and only after it has given the same logits
as the model itself; everything else goes the model's own way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import Attention, ChunkAttention, SingleTokenAttention
from .candidate_overlay import layer_kinds
from .fused_ops import EAGER, PointwiseOps
from .kv_cache import KVCache
from .packed_linear import LIMIT, FusedLinear, PackedLinears

PATTERN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
"""Architectures: RMS norm before attention and MLP, rotary positions, gated SiLU, no other twist."""

FIXED_ROTATIONS = {"default", "linear", "llama3"}
"""Rotary embeddings whose angles depend on the position alone."""

CHUNK = 1024
"""Tokens of a prompt that one forward reads here, at most."""

CLOSE = 1e-3
"""Largest difference to the model's own logits, as a share of their range, at the first use."""

TRIALS = 3
"""Sequences tried until one agrees: in half precision some (special tokens) are rounding in any arithmetic."""


class DecoderLayer:
    """One decoder layer's weights."""

    def __init__(self, layer: Any, window: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv, self.o = (
            FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj),
            FusedLinear(attention.o_proj),
        )
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.gate_up, self.down = FusedLinear(mlp.gate_proj, mlp.up_proj), FusedLinear(mlp.down_proj)
        self.head_dim, self.scale, self.window = attention.head_dim, attention.scaling, window

    @property
    def fused_linears(self) -> list[FusedLinear]:
        """Its linear maps."""
        return [self.qkv, self.o, self.gate_up, self.down]

    def __call__(self, index: int, x: Tensor, h: Tensor, rows: BatchMetadata) -> tuple[Tensor, Tensor]:
        """``[N, H]`` to ``[N, H]``.

        Args:
            index: of this layer in the KV.
            x: N rows.
            h: their norm.
            rows: all else about them.

        Returns:
            The rows after attention, and what the MLP adds to them.
        """
        n, d = h.shape[0], self.head_dim
        q, k, v = (each.view(n, -1, d) for each in rows.affine(self.qkv, h))
        if self.q_norm is not None:
            q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        (out,) = rows.affine(self.o, rows.over(self, index, *rows.ops.rotary_embedding(q, k, rows.cos, rows.sin), v))
        x, h = rows.ops.add_rms_norm(x, out, *norm_of(self.between))
        (out,) = rows.affine(self.down, rows.gated(self.gate_up, h))
        return x, out


LinearMap = Callable[[FusedLinear, Tensor], tuple[Tensor, ...]]
"""From a fused linear of linear modules and inputs ``[N, in]`` to the ``[N, out]`` of each module."""

Gate = Callable[[FusedLinear, Tensor], Tensor]
"""From the fused linear of gate and up and inputs ``[N, in]`` to what the gate lets through, ``[N, out]``."""


@dataclass(frozen=True)
class BatchMetadata:
    """Per-forward batch metadata of the rows that go through all layers.

    Attributes:
        cos: ``[N, 1, d]``, of each row's position; ``[1, 1, d]`` where all stand at one.
        sin: as ``cos``.
        over: what the rows attend to, and where their keys and values go.
        affine: how a fused linear of linear modules maps them.
        ops: how all else is computed.
        gate: in place of ``affine`` and ``ops`` in an MLP.
    """

    cos: Tensor
    sin: Tensor
    over: Attention
    affine: LinearMap
    ops: PointwiseOps = EAGER
    gate: Gate | None = None

    def gated(self, gate_up: FusedLinear, h: Tensor) -> Tensor:
        """The inner activations of an MLP, from ``[N, H]``."""
        return self.ops.silu_and_mul(*self.affine(gate_up, h)) if self.gate is None else self.gate(gate_up, h)


class LlamaDecoder:
    """The decoder and output layer of one model.

    Args:
        model: a causal LM of a known architecture; see ``llama_decoder_of``.
        prepack: bytes of weights that may be held twice, see ``packed_linear``.
    """

    def __init__(self, model: Any, prepack: int) -> None:
        decoder, config = model.get_decoder(), model.config
        self._embed = decoder.embed_tokens
        self._head = FusedLinear(model.get_output_embeddings())
        self._rotary = decoder.rotary_emb
        window = getattr(config, "sliding_window", None)
        kinds = layer_kinds(config)
        self._layers = [
            DecoderLayer(layer, window if kind == "sliding_attention" else None)
            for layer, kind in zip(decoder.layers, kinds, strict=True)
        ]
        self._norms = [*(layer.before for layer in self._layers[1:]), decoder.norm]  # the one after each layer
        self.fused_linears = [fused for layer in self._layers for fused in layer.fused_linears]
        self.linear = PackedLinears([*self.fused_linears, self._head], prepack)
        """How a fused linear of this model's linear modules maps rows."""
        self._angles: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self._layers)

    def no_kv(self) -> Tensor:
        """KV of no tokens, ``[2, layers, 1, key heads, 0, d]``."""
        first = self._layers[0]
        heads = first.qkv.widths[1] // first.head_dim
        like: Tensor = self._embed.weight
        return like.new_empty(2, self.layers, 1, heads, 0, first.head_dim)

    def seen_bytes(self, tokens: int) -> int:
        """Of one layer's keys and values of so many tokens, as every query head sees them."""
        size: int = self._embed.weight.element_size()
        width: int = self._layers[0].qkv.widths[0]
        return 2 * tokens * width * size

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
        hidden = self.rows(ids, positions, SingleTokenAttention(caches))
        return self.logits(hidden), hidden

    def rows(self, ids: Tensor, positions: Sequence[int], over: Attention, affine: LinearMap | None = None) -> Tensor:
        """Last hidden states ``[N, H]`` of tokens ``[N]`` at their positions.

        Args:
            ids: tokens.
            positions: theirs.
            over: see ``DecoderLayer``.
            affine: in place of ``linear``; for corrections on some of the rows.
        """
        return self.through(ids, BatchMetadata(*self._rotations(positions), over, affine or self.linear))

    def through(self, ids: Tensor, rows: BatchMetadata) -> Tensor:
        """``rows`` where the rotations are at hand."""
        x = functional.embedding(ids, self._embed.weight)
        h = normed(self._layers[0].before, x)
        with self.linear.unchanging():
            for index, (layer, norm) in enumerate(zip(self._layers, self._norms, strict=True)):
                x, h = rows.ops.add_rms_norm(*layer(index, x, h, rows), *norm_of(norm))
        return h

    def logits(self, hidden: Tensor, affine: LinearMap | None = None) -> Tensor:
        """``[N, V]`` in fp32, of last hidden states ``[N, H]``; by ``linear`` where nothing else is given."""
        (logits,) = (affine or self.linear)(self._head, hidden)
        return logits.float()

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


def normed(module: Any, x: Tensor) -> Tensor:
    """RMS norm over the last dimension, with the module's weight."""
    return functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def norm_of(module: Any) -> tuple[Tensor, float]:
    """Weight and epsilon of an RMS norm."""
    return module.weight, module.variance_epsilon


def hooks_of(decoder: nn.Module) -> list[Any]:
    """Where its modules keep their hooks: what is put on later appears there."""
    return [hooks for module in decoder.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def llama_decoder_of(model: Any, prepack: int = LIMIT) -> LlamaDecoder | None:
    """The written-out decoder: for known architectures with plain layers, if a trial gives the same logits."""
    if type(model).__name__ not in PATTERN or not _plain(model):
        return None
    decoder = LlamaDecoder(model, prepack)
    vocab: int = model.get_input_embeddings().weight.shape[0]
    trials = (torch.arange(1, 5) + trial * vocab // TRIALS for trial in range(TRIALS))
    return decoder if any(_agrees(model, decoder, ids % vocab) for ids in trials) else None


def _plain(model: Any) -> bool:
    """Whether every layer is what the pattern says: no quantised or replaced modules, fixed rotations."""
    config, layers = model.config, model.get_decoder().layers
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    linears = [m for layer in layers for m in layer.modules() if hasattr(m, "in_features")]
    return (
        rotation in FIXED_ROTATIONS
        and config.hidden_act == "silu"
        and all(type(module) is nn.Linear for module in [*linears, model.get_output_embeddings()])
        and not getattr(config, "output_attentions", False)
        and len({weight.device for weight in model.parameters()}) == 1
    )


@torch.inference_mode()
def _agrees(model: Any, decoder: LlamaDecoder, trial: Tensor) -> bool:
    """Three tokens, and one after them, of four ``[4]``, both ways."""
    ids = trial[None].to(model.device)
    cache = KVCache()
    theirs = model(input_ids=ids[:, :3], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
    ours = decoder.logits(decoder.rows(ids[0, :3], range(3), ChunkAttention(KVCache(), 0))[-1:])
    if not close(ours, theirs, model.dtype):
        return False
    ours, _ = decoder(ids[0, 3:], [3], [cache])
    cache.crop(-1)
    theirs = model(input_ids=ids[:, 3:], past_key_values=cache, use_cache=True).logits[:, -1].float()
    return close(ours, theirs, model.dtype)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways of computing logits in ``dtype`` say the same."""
    span = 1.0 if dtype == torch.float32 else 30.0  # half precision rounds at other places
    return bool((ours - theirs).abs().max() <= span * CLOSE * (theirs.max() - theirs.min()))
