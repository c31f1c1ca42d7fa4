"""llama.cpp's C interface, declared for the one prebuilt version that we compare with.

The libraries are those inside node-llama-cpp 3.22.1 (llama.cpp v0.5.0), called directly: no
JavaScript stands between a measurement and `llama_decode`. Structures pass by value and change
between versions, so any other version is refused.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path

from scripts.parity.peers import node_llama_cpp_folder

VERSION = "0.5.0"
PLATFORMS = {("linux", "x86_64"): "linux-x64", ("linux", "aarch64"): "linux-arm64"}
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}

LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class PeerMissing(Exception):
    """Why llama.cpp cannot be measured here, in one line."""


class ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class ThreadpoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int32),
        ("prio", c_int32),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


# name: (result, arguments)
LLAMA = {
    "llama_version": (c_char_p, ()),
    "llama_backend_init": (None, ()),
    "llama_print_system_info": (c_char_p, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_attach_threadpool": (None, (c_void_p, c_void_p, c_void_p)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
    "llama_set_adapters_lora": (
        c_int32,
        (c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)),
    ),
}
GGML = {"ggml_backend_load": (c_void_p, (c_char_p,))}
GGML_BASE = {
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int32, c_void_p, c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, c_void_p),
    ),
    "ggml_log_set": (None, (LogCallback, c_void_p)),
}
GGML_CPU = {
    "ggml_threadpool_new": (c_void_p, (POINTER(ThreadpoolParams),)),
    "ggml_threadpool_free": (None, (c_void_p,)),
    "ggml_threadpool_pause": (None, (c_void_p,)),
}


def libraries() -> Path:
    """The folder of the prebuilt libraries. Raises PeerMissing."""
    folder, advice = node_llama_cpp_folder()
    if folder is None:
        raise PeerMissing(f"node-llama-cpp not found ({advice})")
    name = PLATFORMS.get((sys.platform, platform.machine()))
    found = folder / "node_modules" / "@node-llama-cpp" / str(name) / "bins" / str(name)
    if name is None or not found.is_dir():
        raise PeerMissing(f"node-llama-cpp has no libraries for {sys.platform} here")
    return found


def load(path: Path, functions: dict[str, tuple[object, tuple[object, ...]]]) -> ctypes.CDLL:
    """A library with these functions declared. Raises PeerMissing."""
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise PeerMissing(f"{path.name}: {error}") from error
    return library


def load_llama() -> ctypes.CDLL:
    """libllama, its version checked. Raises PeerMissing."""
    path = libraries() / f"libllama.v{VERSION}.so"
    library = load(path, LLAMA)
    version = library.llama_version().decode()
    # Its defaults, read through these declarations, show that the structures lie as declared.
    context, model = library.llama_context_default_params(), library.llama_model_default_params()
    seen = (context.n_batch, context.n_ubatch, context.type_k, context.type_v, context.n_samplers)
    if (
        version.split("-")[0] != VERSION
        or seen != (2048, 512, 1, 1, 0)
        or not model.use_extra_bufts
    ):
        raise PeerMissing(f"libllama is {version}; these declarations are for {VERSION}")
    return library


def load_ggml_base() -> ctypes.CDLL:
    return load(libraries() / "libggml-base.so", GGML_BASE)


def cpu_library(variant: str | None) -> Path:
    """The library of CPU kernels: the named one ("haswell"), or the best, by their own score."""
    folder = libraries()
    if variant is not None:
        path = folder / f"libggml-cpu-{variant}.so"
        if not path.exists() or _score(path) == 0:
            raise PeerMissing(f"llama.cpp has no {variant} kernels that run here")
        return path
    scored = [(_score(path), path) for path in sorted(folder.glob("libggml-cpu*.so"))]
    if not scored or max(scored)[0] == 0:
        raise PeerMissing("none of llama.cpp's CPU libraries runs here")
    return max(scored)[1]


def _score(path: Path) -> int:
    try:
        return int(ctypes.CDLL(str(path)).ggml_backend_score())
    except AttributeError:
        return 1  # the only one of its platform has no score
