"""What a dispatch did, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counters:
    """Counts of one dispatch. All sizes are in bytes.

    `loaded_*` and `stored_*` are what the instructions of all threads ask for, after clang's
    optimiser; lanes that read the same address count each. `constant` memory is the buffers bound
    as `constant` and the tables of the program. Accesses of atomics count too.

    `lines_*` are distinct 128-byte lines of the buffers. `moved_*` are the bytes that pass between
    memory and the chip if one LRU cache (`cache_bytes`) stands in between, threadgroups run one
    after another in grid order, and stores are written back when a line leaves. Lines end with
    their buffer, so that a kernel that reads a buffer once moves exactly its size.

    `bank_conflicts`: cycles beyond the least, of accesses to threadgroup memory, under the model
    that runtime/banks.h states; `bank_steps`: the simdgroup-wide accesses it was applied to.

    `uninitialised`: bytes loaded that nothing was stored to. `unwritten`: bytes of the outputs
    that the kernel never stored to, of outputs without an initial value.

    Without counting (`Emulator(count=False)`), all that needs the watched accesses is 0.
    """

    threads: int = 0
    threadgroups: int = 0
    threadgroup_bytes: int = 0
    simd_ops: int = 0
    matrix_ops: int = 0
    barriers: int = 0
    simd_barriers: int = 0
    atomics: int = 0
    loaded_device: int = 0
    loaded_constant: int = 0
    loaded_threadgroup: int = 0
    stored_device: int = 0
    stored_threadgroup: int = 0
    lines_read: int = 0
    lines_written: int = 0
    moved_read: int = 0
    moved_written: int = 0
    cache_bytes: int = 0
    bank_steps: int = 0
    bank_conflicts: int = 0
    uninitialised: int = 0
    unwritten: int = 0

    @property
    def moved(self) -> int:
        """Bytes moved either way: what comparisons between kernels use."""
        return self.moved_read + self.moved_written

    @property
    def matrix_flops(self) -> int:
        """Operations of the 8x8 matrix multiplications: 2 * 8 * 8 * 8 each."""
        return self.matrix_ops * 1024
