"""The structs of runtime/abi.h, for ctypes."""

from __future__ import annotations

import ctypes as c

SPACES = {"device": 0, "constant": 1}


class Buffer(c.Structure):
    _fields_ = (
        ("data", c.c_void_p), ("bytes", c.c_uint64), ("space", c.c_uint32),
        ("writable", c.c_uint32), ("initialised", c.c_uint32), ("_pad", c.c_uint32),
        ("unwritten", c.c_uint64), ("loaded", c.c_uint64), ("stored", c.c_uint64),
    )  # fmt: skip


class Variable(c.Structure):
    _fields_ = (("address", c.c_void_p), ("bytes", c.c_uint64))


class Launch(c.Structure):
    _fields_ = (
        ("entry", c.c_void_p), ("buffers", c.POINTER(Buffer)), ("variables", c.POINTER(Variable)),
        ("arena", c.c_uint64), ("arena_bytes", c.c_uint64), ("cache_bytes", c.c_uint64),
        ("buffer_count", c.c_uint32), ("variable_count", c.c_uint32),
        ("grid", c.c_uint32 * 3), ("group", c.c_uint32 * 3),
        ("order", c.c_uint32), ("seed", c.c_uint32), ("strict", c.c_uint32),
        ("low", c.c_uint32), ("watch", c.c_uint32), ("initialised", c.c_uint32),
    )  # fmt: skip


class Report(c.Structure):
    _fields_ = (
        ("threads", c.c_uint64), ("threadgroups", c.c_uint64), ("switches", c.c_uint64),
        ("simd_ops", c.c_uint64), ("matrix_ops", c.c_uint64), ("barriers", c.c_uint64),
        ("simd_barriers", c.c_uint64), ("atomics", c.c_uint64),
        ("loaded", c.c_uint64 * 3), ("stored", c.c_uint64 * 3),
        ("lines_read", c.c_uint64), ("lines_written", c.c_uint64),
        ("moved_read", c.c_uint64), ("moved_written", c.c_uint64),
        ("bank_steps", c.c_uint64), ("bank_conflicts", c.c_uint64), ("uninitialised", c.c_uint64),
        ("kind", c.c_uint32), ("region", c.c_uint32), ("is_write", c.c_uint32),
        ("in_threadgroup", c.c_uint32), ("offset", c.c_int64), ("bytes", c.c_uint64),
        ("extra", c.c_int64), ("pc", c.c_uint64),
        ("thread", c.c_uint32 * 3), ("group", c.c_uint32 * 3),
        ("other_thread", c.c_uint32), ("other_group", c.c_uint32), ("other_write", c.c_uint32),
        ("has_line", c.c_uint32), ("line", c.c_uint32), ("column", c.c_uint32),
        ("file", c.c_char * 128), ("text", c.c_char * 128),
    )  # fmt: skip
