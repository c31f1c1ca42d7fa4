"""Which backends this machine has, and opening one by name."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import get_args

from localllm.backend.cpu_memory import CpuMemory
from localllm.backend.memory import BackendMemory, ReferenceMemory
from localllm.backend.metal_memory import MetalMemory
from localllm.backend.packed_folder import PackedPlace
from localllm.backend.protocol import Activations, Backend
from localllm.checkpoint.tensor import Tensor
from localllm.errors import BackendUnavailable, InvalidRequest
from localllm.spec import DecoderSpec

Weights = Iterable[tuple[str, Tensor]]

EMULATOR = "LOCALLLM_METAL_EMULATOR"  # set to 1: the metal backend runs without an Apple GPU


@dataclass(frozen=True)
class BackendStatus:
    """reason: what the backend is if it can run here, else what is missing.

    kv_bits: how wide the numbers in its KV cache may be, the default first. step_rows: rows of a
    full step. activations: as what they may meet quantized weights, the default first. memory:
    what it takes. budget: bytes that it may have in all, None for whatever the machine has free.
    """

    name: str
    available: bool
    reason: str
    hint: str | None = None
    kv_bits: tuple[int, ...] = (32,)
    step_rows: int = 128
    activations: tuple[Activations, ...] = ("float32",)
    memory: BackendMemory = field(default_factory=ReferenceMemory, compare=False)
    budget: int | None = None

    def checked_kv_bits(self, wish: int | None) -> int:
        """The wish, or for None the default. Raises InvalidRequest for bits that it lacks."""
        if wish is None:
            return self.kv_bits[0]
        if wish not in self.kv_bits:
            only = " or ".join(map(str, self.kv_bits))
            raise InvalidRequest(
                f"the {self.name} backend keeps a KV cache of {only} bits, not {wish}",
                hint=f"leave `kv_bits` out or ask for {only}, or choose another backend",
            )
        return wish

    def kv_value_bytes(self, bits: int | None = None) -> float:
        """What one number costs in its KV cache, a share of its scale included."""
        chosen = self.checked_kv_bits(bits)
        return chosen / 8 + (1 / 16 if chosen < 16 else 0)


def available_backends() -> list[BackendStatus]:
    """Every backend there is, best first, those that cannot run here included."""
    return [entry.probe() for entry in _entries()]


def choose_backend(name: str | None) -> BackendStatus:
    """The backend of this name, or for None the best that runs here.

    Raises BackendUnavailable for an unknown name or one that cannot run here.
    """
    backends = available_backends()
    usable = [status for status in backends if status.available]
    if name is None:
        if usable:
            return usable[0]
        reasons = "; ".join(f"{status.name}: {status.reason}" for status in backends)
        raise BackendUnavailable(f"no backend can run here ({reasons})", hint=backends[-1].hint)
    for status in backends:
        if status.name != name:
            continue
        if not status.available:
            raise BackendUnavailable(
                f"the {name} backend cannot run here: {status.reason}", hint=status.hint
            )
        return status
    there_is = ", ".join(status.name for status in usable) or "none"
    raise BackendUnavailable(
        f"there is no backend named {name!r}",
        hint=f"backends of this machine: {there_is}; leave the name out to take the best",
    )


def candidates(name: str | None) -> list[BackendStatus]:
    """The named backend alone, or every one that runs here, best first.

    Raises BackendUnavailable as `choose_backend` does.
    """
    best = choose_backend(name)
    if name is not None:
        return [best]
    return [status for status in available_backends() if status.available]


def open_backend(
    name: str | None,
    spec: DecoderSpec,
    weights: Weights,
    *,
    num_blocks: int | Sequence[int],
    state_slots: int = 0,
    threads: int | None = None,
    activations: Activations | None = None,
    kv_bits: int | None = None,
    packed: PackedPlace | None = None,
    expert_bytes: int | None = None,
) -> Backend:
    """Loads `spec` and `weights` into the named backend, or the best one of this machine.

    num_blocks: KV blocks in the pool, one number or one for each of `kv_groups(spec)`.
    state_slots: states of recurrent layers, for a model that has some. threads: at most so many
    compute threads, None for the backend's choice. activations, kv_bits: None for the
    backend's default. packed: where a backend that prepares weights may keep them; None: nowhere.
    expert_bytes: memory for a mixture's experts, the others being read from disk when they are
    chosen, as the plan for a backend that can says; None: all are in memory.
    Raises BackendUnavailable, InvalidRequest for a thread limit, activations or KV bits that
    cannot be had, and what loading raises (CheckpointError, OutOfMemoryPlan).
    """
    if threads is not None and threads < 1:
        raise InvalidRequest(f"threads must be at least 1, not {threads}")
    chosen = choose_backend(name)
    check_activations(chosen, activations)
    bits = chosen.checked_kv_bits(kv_bits)
    entry = next(entry for entry in _entries() if entry.name == chosen.name)
    wishes = _Wishes(threads, activations, bits, packed, state_slots, expert_bytes)
    return entry.open(spec, weights, num_blocks, wishes)


def check_activations(backend: BackendStatus, wish: Activations | None) -> None:
    """InvalidRequest, with the reason, unless `backend` computes with such activations."""
    known = get_args(Activations)
    if wish is not None and wish not in known:
        raise InvalidRequest(f"activations must be one of {', '.join(known)}, not {wish!r}")
    if wish is not None and wish not in backend.activations:
        only = " or ".join(backend.activations)
        raise InvalidRequest(
            f"the {backend.name} backend computes with {only} activations, not {wish}",
            hint=f"leave `activations` out or ask for {only}, or choose another backend",
        )


@dataclass(frozen=True)
class _Wishes:
    threads: int | None
    activations: Activations | None
    kv_bits: int
    packed: PackedPlace | None
    state_slots: int
    expert_bytes: int | None


@dataclass(frozen=True)
class _Entry:
    name: str
    probe: Callable[[], BackendStatus]
    open: Callable[[DecoderSpec, Weights, int | Sequence[int], _Wishes], Backend]


def _probe_reference() -> BackendStatus:
    # Looked up, not imported: `localllm doctor` and the error paths stay quick.
    if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx.core") is None:
        package = "mlx" if sys.platform == "darwin" else "mlx[cpu]"
        hint = f"pip install '{package}'"
        return BackendStatus("reference", False, "MLX is not installed", hint)
    return BackendStatus(
        "reference", True, "plain MLX in float32 on the CPU; exact, and slow beyond small models"
    )


def _open_reference(
    spec: DecoderSpec, weights: Weights, num_blocks: int | Sequence[int], wishes: _Wishes
) -> Backend:
    # MLX computes on one thread on Linux, so any limit is kept. On macOS its matrix products
    # belong to Accelerate, which picks its threads itself and cannot be told once loaded.
    if wishes.threads is not None and sys.platform == "darwin":
        raise InvalidRequest(
            "the reference backend cannot limit its threads on macOS",
            hint="leave `threads` out, or set VECLIB_MAXIMUM_THREADS before starting",
        )
    try:
        from localllm.backend.reference import ReferenceBackend
    except ImportError as error:
        raise BackendUnavailable(
            f"the reference backend cannot run here: MLX does not load ({error})",
            hint="reinstall it: pip install --force-reinstall 'mlx[cpu]'",
        ) from error
    return ReferenceBackend(spec, weights, num_blocks=num_blocks, state_slots=wishes.state_slots)


def _probe_cpu() -> BackendStatus:
    if importlib.util.find_spec("localllm.kernels_cpu._native") is None:
        return BackendStatus(
            "cpu",
            False,
            "the native module was not built",
            hint="install localllm again with a C++17 compiler at hand",
        )
    return BackendStatus(
        "cpu",
        True,
        "the native engine: the whole decoder in C++",
        kv_bits=(16, 8, 4),
        step_rows=512,
        activations=("int8", "float32"),
        memory=CpuMemory(),
    )


def _open_cpu(
    spec: DecoderSpec, weights: Weights, num_blocks: int | Sequence[int], wishes: _Wishes
) -> Backend:
    try:
        from localllm.backend.cpu import CpuBackend
        from localllm.backend.cpu_cache import PackedCache
    except ImportError as error:
        raise BackendUnavailable(
            f"the cpu backend cannot run here: its native module does not load ({error})",
            hint="install localllm again with a C++17 compiler at hand",
        ) from error
    packed = wishes.packed
    return CpuBackend(
        spec,
        weights,
        num_blocks=num_blocks,
        threads=wishes.threads,
        kv_bits=wishes.kv_bits,
        float_activations=wishes.activations == "float32",
        cache=None if packed is None else PackedCache(packed.folder, packed.files),
        state_slots=wishes.state_slots,
        expert_bytes=wishes.expert_bytes,
    )


def _emulated() -> bool:
    return os.environ.get(EMULATOR, "").strip().lower() in ("1", "true", "yes", "on")


def _probe_metal() -> BackendStatus:
    if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx.core") is None:
        hint = "pip install 'mlx'" if sys.platform == "darwin" else "pip install 'mlx[cpu]'"
        return BackendStatus("metal", False, "MLX is not installed", hint)
    budget = None
    if sys.platform == "darwin" and platform.machine() == "arm64":
        from localllm.backend.metal_limits import working_set

        budget = working_set()
    if budget is None and not _emulated():
        return BackendStatus("metal", False, "there is no Apple GPU")
    reason = "the Apple GPU: MLX, with kernels of our own where they measure faster"
    if budget is None:
        reason = f"MLX on the CPU, kernels in the emulator ({EMULATOR}): for proof, not for use"
    return BackendStatus(
        "metal",
        True,
        reason,
        kv_bits=(16, 8, 4),
        step_rows=512,
        memory=MetalMemory(),
        budget=budget,
    )


def _open_metal(
    spec: DecoderSpec, weights: Weights, num_blocks: int | Sequence[int], wishes: _Wishes
) -> Backend:
    if wishes.threads is not None:
        raise InvalidRequest(
            "the metal backend computes on the GPU and has no threads to limit",
            hint="leave `threads` out",
        )
    from localllm.backend.metal import MetalBackend
    from localllm.backend.metal_kernels import chooser, emulator

    return MetalBackend(
        spec,
        weights,
        num_blocks=num_blocks,
        state_slots=wishes.state_slots,
        kv_bits=wishes.kv_bits,
        choose=chooser(),
        executor=emulator() if _emulated() else None,
    )


_METAL = _Entry("metal", _probe_metal, _open_metal)
_OTHERS = (
    _Entry("cpu", _probe_cpu, _open_cpu),
    _Entry("reference", _probe_reference, _open_reference),
)


def _entries() -> tuple[_Entry, ...]:
    """Best first. In the emulator the metal backend is the slowest there is."""
    return (*_OTHERS, _METAL) if _emulated() else (_METAL, *_OTHERS)
