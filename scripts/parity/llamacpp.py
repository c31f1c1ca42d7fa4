"""llama.cpp as a library: a model, its context and `llama_decode`, called directly.

    with LlamaCpp(path, threads=1) as peer:
        logits = peer.decode([504, 3575], start=0)

Its log is silenced. A process can hold one set of its CPU kernels, so each variant needs a process
of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from scripts.parity.llamacpp_abi import (
    FLASH_ATTENTION,
    GGML,
    GGML_CPU,
    VERSION,
    Batch,
    LogCallback,
    PeerMissing,
    ThreadpoolParams,
    cpu_library,
    libraries,
    load,
    load_ggml_base,
    load_llama,
)

__all__ = ["LlamaCpp", "PeerMissing"]

UBATCH = 512  # rows computed at once, its default


class LlamaCpp:
    """One model with one context.

    context: positions of each sequence; sequences: how many there are.
    variant: a CPU library by name ("haswell", "zen4"); None for the one it would choose itself.
    flash_attention: "on", "off" or "auto".
    lora: a GGUF file with an adapter. kv_float32: keys and values in float32, not float16.
    A thread pool is attached as its own benchmark does, and paused by `pause`.
    Raises PeerMissing.
    """

    def __init__(
        self,
        model: Path,
        *,
        threads: int = 1,
        context: int = 1024,
        sequences: int = 1,
        variant: str | None = None,
        flash_attention: str = "auto",
        lora: Path | None = None,
        kv_float32: bool = False,
    ) -> None:
        self._llama, self._cpu, self.kernels = _start(variant)
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._llama.llama_model_load_from_file(str(model).encode(), params)
        if not self._model:
            raise PeerMissing(f"llama.cpp {VERSION} does not load {model.name}")
        vocabulary = self._llama.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._llama.llama_vocab_n_tokens(vocabulary))
        self._is_end = lambda token: bool(self._llama.llama_vocab_is_eog(vocabulary, token))
        self._kv_type = 0 if kv_float32 else 1
        self._context = self._new_context(threads, context, sequences, flash_attention)
        if lora is not None:
            self._add_lora(lora)
        self._memory = self._llama.llama_get_memory(self._context)
        pool = ThreadpoolParams(n_threads=threads, poll=50)
        self._pool = self._cpu.ggml_threadpool_new(ctypes.byref(pool))
        self._llama.llama_attach_threadpool(self._context, self._pool, None)
        self._rows = max(UBATCH, sequences)
        self._batch: Batch = self._llama.llama_batch_init(self._rows, 0, 1)

    def _new_context(self, threads: int, context: int, sequences: int, flash: str) -> Any:
        params = self._llama.llama_context_default_params()
        params.n_ctx = context * sequences
        params.n_batch = params.n_ubatch = UBATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = self._kv_type
        params.flash_attn_type = FLASH_ATTENTION[flash]
        params.swa_full = False  # caches of sliding-window layers hold the window alone
        params.kv_unified = False  # sequences share no prefix: a cache for each
        made = self._llama.llama_init_from_model(self._model, params)
        if not made:
            raise PeerMissing("llama.cpp made no context")
        return made

    def _add_lora(self, path: Path) -> None:
        adapter = self._llama.llama_adapter_lora_init(self._model, str(path).encode())
        if not adapter:
            raise PeerMissing(f"llama.cpp {VERSION} does not load the adapter {path.name}")
        adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
        if self._llama.llama_set_adapters_lora(self._context, adapters, 1, scales):
            raise PeerMissing(f"llama.cpp {VERSION} does not take the adapter {path.name}")

    @property
    def system(self) -> str:
        """The instruction sets of the kernels in use, in its own words."""
        return str(self._llama.llama_print_system_info().decode().strip(" |"))

    def is_end(self, token: int) -> bool:
        """Whether this token ends an answer."""
        return self._is_end(token)

    def decode(
        self, tokens: Sequence[int], start: int, *, sequence: int = 0, all_logits: bool = False
    ) -> np.ndarray:
        """Runs consecutive tokens of one sequence; float32 logits of the last or of all rows."""
        for at in range(0, len(tokens), self._rows):
            part = tokens[at : at + self._rows]
            rows = [
                (token, start + at + i, sequence, all_logits or at + i == len(tokens) - 1)
                for i, token in enumerate(part)
            ]
            logits = self.step(rows)
        return logits

    def step(self, rows: Sequence[tuple[int, int, int, bool]]) -> np.ndarray:
        """One `llama_decode` of rows (token, position, sequence, wants logits).

        float32 [rows that want logits, vocabulary]: a view that the next step overwrites.
        """
        assert len(rows) <= self._rows
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        if code := self._llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        count = sum(wanted for *_, wanted in rows)
        if not count:
            return np.zeros((0, self.vocab_size), np.float32)
        values = self._llama.llama_get_logits(self._context)  # waits for the step to end
        return np.ctypeslib.as_array(values, (count, self.vocab_size))

    def rewind(self, length: int, sequence: int = 0) -> None:
        """Forgets the positions from `length` on."""
        self._llama.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def clear(self) -> None:
        self._llama.llama_memory_clear(self._memory, False)

    def pause(self) -> None:
        """Its threads stop polling for work until the next step."""
        self._cpu.ggml_threadpool_pause(self._pool)

    def close(self) -> None:
        if not self._context:
            return
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)
        self._cpu.ggml_threadpool_free(self._pool)
        self._context = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_quiet = LogCallback(lambda level, text, data: None)  # kept for as long as it may be called


@cache
def _start(variant: str | None) -> tuple[ctypes.CDLL, ctypes.CDLL, str]:
    """libllama and its CPU library, loaded once, and the library's short name."""
    path = cpu_library(variant)
    load_ggml_base().ggml_log_set(_quiet, None)
    ggml = load(libraries() / f"libggml.v{VERSION}.so", GGML)
    llama = load_llama()
    llama.llama_log_set(_quiet, None)
    if not ggml.ggml_backend_load(str(path).encode()):
        raise PeerMissing(f"llama.cpp did not load {path.name}")
    llama.llama_backend_init()
    return llama, load(path, GGML_CPU), path.stem.removeprefix("libggml-cpu").lstrip("-")
