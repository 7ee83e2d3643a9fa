"""One batch of work through a transformers model, by the fastest exact path that the model and the device have.

    CUDA graphs       single tokens, chunks and candidates over a KV pool of fixed capacity (``cuda.graph_runner``)
    Llama decoder     the layers written out, without modules: known architectures, few tokens (``llama_decoder``)
    modules           everything else: several items packed into one row (``packed_batch``), or one item alone

A path is used only after a trial in which it gave the logits of the modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..base import Append, Output, ScoreCandidates, ScoreTree, StepOutput, Work
from .candidate_overlay import cloned_rows
from .cuda.graph_runner import GraphRunner, graph_runner_of
from .decoder_batch import DecoderBatch
from .kv_cache import KVCache
from .llama_decoder import CHUNK, LlamaDecoder, hooks_of, llama_decoder_of
from .packed_batch import through_modules
from .sdpa_backend import without_cudnn_attention
from .text_decoder import text_decoder

T = TypeVar("T")


class ModelRunner:
    """Chooses the path of each forward. Not thread-safe: used under the backend's lock.

    Args:
        model: a ``transformers`` causal LM.
        attention_only: every layer is attention, so that its decoder may be written out.
        packs: several sequences fit into one row of the modules, and candidates are exact there.
        resumes_in_chunks: several tokens after a cache are read as in one go; else token by token.
        graphs: single tokens run as captured graphs, where several sequences share a forward.
        prepack: bytes of weights that a CPU may hold a second time, see ``packed_linear``.

    Attributes:
        batches: several sequences can share a forward.
        graph_runner: the captured graphs; None before the first single token, and where none can be captured.
    """

    def __init__(
        self,
        model: Any,
        *,
        attention_only: bool,
        packs: bool,
        resumes_in_chunks: bool,
        graphs: bool,
        prepack: int,
    ) -> None:
        self.model, self._attention_only, self._packs = model, attention_only, packs
        self._resumes_in_chunks, self._prepack = resumes_in_chunks, prepack
        self.graph_runner: GraphRunner | None = None
        self.decoder = text_decoder(model)
        self.config, self.device = model.config.get_text_config(), model.device
        self._last_hidden: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)
        self.batches = packs or self.llama_decoder is not None
        self._graphs = graphs and self.batches

    @torch.inference_mode()
    def forward(self, batch: Sequence[Work]) -> list[Output]:
        """All items in one forward; without ``packs`` there must be one. Outputs in their order."""
        outputs = self._by_graphs(batch)
        rest = [at for at in range(len(batch)) if at not in outputs]
        if rest:
            work = self._on_device([batch[at] for at in rest])
            with without_cudnn_attention(self.device):
                computed = self._wait([self._run_one(work[0])] if len(batch) == 1 else self._run_batch(work))
            outputs.update(zip(rest, computed, strict=True))
        return [outputs[at] for at in range(len(batch))]

    def through_modules(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The model's own forward: logits ``[B, T, V]`` and last hidden states ``[B, T, H]``; gradients flow."""
        out = self.model(**inputs)
        assert self._last_hidden is not None
        hidden, self._last_hidden = self._last_hidden, None
        return out.logits, hidden

    def use_graphs(self, graph_runner: GraphRunner | None) -> None:
        """From now on single tokens go through these graphs; None makes some at the first."""
        self._graphs, self.graph_runner = True, graph_runner

    def _capture(self) -> None:
        """Capture graphs: on CUDA, where the decoder can be written out. What fails is not tried again."""
        if self.decoder_batch is not None:
            self.graph_runner = graph_runner_of(self.model, self.decoder_batch)
        self._graphs = self.graph_runner is not None

    @cached_property
    def llama_decoder(self) -> LlamaDecoder | None:
        """The decoder written out, of a known architecture."""
        return llama_decoder_of(self.model, self._prepack) if self._attention_only else None

    @cached_property
    def decoder_batch(self) -> DecoderBatch | None:
        """The written-out forward of tokens and candidates together."""
        return DecoderBatch(self.llama_decoder, self.model) if self.llama_decoder is not None else None

    def _by_graphs(self, batch: Sequence[Work]) -> dict[int, Output]:
        """Outputs of the items that captured graphs could run, by their place."""
        if not self._graphs or any(self._hooks):
            return {}
        if self.graph_runner is None:  # nothing is compiled before the first single token: there may never be one
            if any(isinstance(item, ScoreCandidates) or len(item.ids) == 1 for item in batch):
                self._capture()
            if self.graph_runner is None:
                return {}
        outputs: dict[int, Output] = dict(self.graph_runner.serve(batch))
        return self._wait(outputs) if any(isinstance(batch[at], ScoreCandidates) for at in outputs) else outputs

    def _on_device(self, batch: Sequence[Work]) -> list[Work]:
        """The same items for an eager forward, their tokens on the model's device."""
        if self.graph_runner is not None:
            self.graph_runner.pass_over(batch)
        if self.device.type == "cpu":
            return list(batch)
        return [replace(item, ids=item.ids.to(self.device)) for item in batch]

    def _wait(self, outputs: T) -> T:
        """The same, once the device is done: until then the time of a forward is not known."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return outputs

    def _run_one(self, item: Work) -> Output:
        if isinstance(item, ScoreTree):
            return self._run_batch([item])[0]
        return self._score(item) if isinstance(item, ScoreCandidates) else self._append(item)

    def _run_batch(self, batch: Sequence[Work]) -> list[Output]:
        if not self._written_out(batch):
            outputs = through_modules(self.model, batch)
            self._last_hidden = None
            return outputs
        assert self.decoder_batch is not None
        if all(isinstance(item, Append) and len(item.ids) == 1 and item.lora is None for item in batch):
            return [StepOutput(*row) for row in zip(*self._single_tokens(batch), strict=True)]
        return self.decoder_batch(batch)

    def _append(self, item: Append) -> StepOutput:
        if self._written_out([item]):
            return self._append_written_out(item)
        if item.length and len(item.ids) > 1 and not self._resumes_in_chunks:
            singles = enumerate(torch.split(item.ids, 1), item.length)
            return [self._append(Append(token, item.cache, length, item.lora)) for length, token in singles][-1]
        with item.lora.on(self.model) if item.lora is not None else nullcontext():
            logits, hidden = self.through_modules(
                input_ids=item.ids[None],
                position_ids=torch.arange(item.length, item.length + len(item.ids), device=self.device)[None],
                past_key_values=item.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return StepOutput(logits[0, -1].float(), hidden[0, -1])

    def _append_written_out(self, item: Append) -> StepOutput:
        assert self.decoder_batch is not None
        if len(item.ids) > 1 or item.lora is not None:
            (output,) = self.decoder_batch([item])
            assert isinstance(output, StepOutput)
            return output
        logits, hidden = self._prefetched(item) or self._single_tokens([item])
        return StepOutput(logits[0], hidden[0])

    def _prefetched(self, item: Append) -> tuple[Tensor, Tensor] | None:
        """The step, if the last candidate scoring has computed it on the way; see ``DecoderBatch.with_prefetch``."""
        assert self.llama_decoder is not None
        prefetched, item.cache.prefetched = item.cache.prefetched, None
        hidden = prefetched.take(int(item.ids), item.cache) if prefetched is not None else None
        return (self.llama_decoder.logits(hidden), hidden) if hidden is not None else None

    def _single_tokens(self, batch: Sequence[Work]) -> tuple[Tensor, Tensor]:
        """Logits ``[N, V]`` and hidden states ``[N, H]`` of one token for each of N sequences."""
        assert self.llama_decoder is not None
        ids = torch.cat([item.ids for item in batch])
        return self.llama_decoder(ids, [item.length for item in batch], [item.cache for item in batch])

    def _written_out(self, batch: Sequence[Work]) -> bool:
        """Whether the written-out decoder takes these: few tokens, candidates after something, no foreign hooks."""
        for item in batch:
            chunk = isinstance(item, Append) and 1 < len(item.ids) <= CHUNK
            single = not isinstance(item, Append) or len(item.ids) == 1
            if not (isinstance(item.cache, KVCache) and (chunk or (single and item.length))):
                return False
        # hooks first: a trial of the decoder under hooks would fail for good
        return not any(self._hooks) and self.llama_decoder is not None

    @cached_property
    def _hooks(self) -> list[Any]:
        """Where the decoder's modules keep hooks; a path around the modules would miss them."""
        return hooks_of(self.decoder)

    def _score(self, item: ScoreCandidates) -> Tensor:
        if self._written_out([item]):
            return self._score_written_out(item)
        if self._packs:
            (packed,) = through_modules(self.model, [item])
            assert isinstance(packed, Tensor)
            return packed
        with item.lora.on(self.model) if item.lora is not None else nullcontext():
            _, hidden = self.through_modules(
                input_ids=item.ids[:, None],
                position_ids=torch.full_like(item.ids, item.length)[:, None],
                past_key_values=cloned_rows(item.cache, len(item.ids)),
                use_cache=True,
            )
        return hidden[:, -1]

    def _score_written_out(self, item: ScoreCandidates) -> Tensor:
        """Candidates, and with an adapter the base's next step for the likeliest of them, in one forward."""
        assert self.decoder_batch is not None
        assert self.llama_decoder is not None
        if item.lora is not None and self.llama_decoder.linear.rows_alike:
            return self.decoder_batch.with_prefetch(item)
        (hidden,) = self.decoder_batch([item])
        assert isinstance(hidden, Tensor)
        return hidden

    def _keep_hidden(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        # A prompt's last token is a view with the prompt's strides, for which torch would copy the output layer.
        if hidden.ndim == 3 and hidden.shape[1] == 1:
            hidden = hidden.clone(memory_format=torch.contiguous_format)
        self._last_hidden = hidden
        return hidden, *args[1:]
