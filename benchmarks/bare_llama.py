"""llama.cpp without anything of ours: the binding's low-level calls, greedy, several sequences in a batch."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from s2t_agents.backends.llamacpp.library import library

BATCH = 512


class BareLlama:
    """A GGUF model in llama.cpp, with a context of its own kind: no hidden states, and each sequence has its own KV.

    Args:
        path: of the file.
        sequences: at once.
        cells: tokens of each.
        threads: of the CPU.

    Attributes:
        prompts: that were read, all but their last tokens.
    """

    def __init__(self, path: Path, *, sequences: int, cells: int, threads: int) -> None:
        self._c = c = library()  # the binding's own module, its log led away
        self._model = c.llama_model_load_from_file(os.fsencode(path), c.llama_model_default_params())
        wanted = c.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = sequences * (-(-cells // 256) * 256), sequences
        wanted.n_batch = wanted.n_ubatch = BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, wanted)
        self._memory = c.llama_get_memory(self._context)
        self._vocabulary = int(c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model)))
        self._batch = c.llama_batch_init(BATCH, 0, 1)
        self.prompts: list[list[int]] = []

    def read(self, prompts: Sequence[Sequence[int]]) -> float:
        """Read all prompts but their last tokens, and forget what was there; returns the seconds."""
        started = time.perf_counter()
        self._c.llama_memory_clear(self._memory, True)
        self.prompts = [list(prompt) for prompt in prompts]
        for number, prompt in enumerate(self.prompts):
            self._append(prompt[:-1], number, 0)
        self._c.llama_synchronize(self._context)
        return time.perf_counter() - started

    def run(self, n: int, tokens: int) -> list[list[float]]:
        """Greedy answers of so many tokens to the first ``n`` prompts at once: when each token came, by sequence."""
        prompts = self.prompts[:n]
        last, stamps = [prompt[-1] for prompt in prompts], []
        for at in range(tokens):
            rows = [(last[row], len(prompt) - 1 + at, row, True) for row, prompt in enumerate(prompts)]
            self._decode(rows)
            last = [self._best(row) for row in range(len(rows))]
            stamps.append(time.perf_counter())
        for number, prompt in enumerate(prompts):
            self._c.llama_memory_seq_rm(self._memory, number, len(prompt) - 1, -1)
        return [stamps] * n

    def _append(self, ids: Sequence[int], number: int, start: int) -> None:
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            self._decode([(token, start + first + at, number, False) for at, token in enumerate(part)])

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        for at, (token, position, number, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = number, wanted
        batch.n_tokens = len(rows)
        if status := self._c.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp's decode failed ({status})")

    def _best(self, row: int) -> int:
        logits = self._c.llama_get_logits_ith(self._context, row)
        flat = (ctypes.c_float * self._vocabulary).from_address(ctypes.addressof(logits.contents))
        return int(np.ctypeslib.as_array(flat).argmax())

    def close(self) -> None:
        """Free everything."""
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)
