"""Kernels with one fault each, and for each its twin: the same kernel made right.

The emulator must find every fault and let every twin pass. A kernel has the input `a`, 64 floats
0, 1, 2, … unless said otherwise, and the output `o`, one float a thread; 64 threads make one
threadgroup.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.emulator import Emulator, KernelFault
from localllm.kernels_metal.kernel import Launch
from tests.kernels_metal.inline import USING, InlineKernel

Stage = Literal["compile", "run", "result", "not caught"]

ORDERS: list[tuple[Literal["forward", "reverse", "random"], int]] = [
    ("forward", 1),
    ("reverse", 1),
    ("random", 1),
    ("random", 2),
]


@dataclass(frozen=True)
class Plant:
    """body, header: of the kernel with the fault; twin, twin_header: of the one without (the
    header is the same if not given). stage: where it is found; "result" means that a wrong
    number gives it away: NaN, or bytes of an output that were never stored to. says: a part of
    the message."""

    title: str
    stage: Stage
    says: str
    body: str
    twin: str
    header: str = ""
    twin_header: str | None = None
    size: int = 64
    threads: int = 64
    group: int = 64
    twin_threads: int | None = None
    twin_group: int | None = None
    strict: bool = False

    def mended(self) -> Plant:
        return replace(
            self,
            body=self.twin,
            header=self.header if self.twin_header is None else self.twin_header,
            threads=self.twin_threads or self.threads,
            group=self.twin_group or self.group,
        )


@dataclass(frozen=True)
class Verdict:
    stage: Stage
    message: str


def judge(plant: Plant) -> Verdict:
    """What the emulator says about the kernel, in four orders of its threads."""
    kernel = InlineKernel(plant.body, header=USING + plant.header, name="planted")
    launch = Launch(
        inputs=[mx.arange(plant.size, dtype=mx.float32)],
        grid=(plant.threads, 1, 1),
        threadgroup=(plant.group, 1, 1),
        output_shapes=[(max(plant.threads, 1),)],
        output_dtypes=[mx.float32],
    )
    results = []
    for order, seed in ORDERS:
        emulator = Emulator(order=order, seed=seed, strict=plant.strict)
        try:
            dispatch = emulator.run(kernel, launch)
        except KernelFault as fault:
            return Verdict(fault.stage, str(fault))
        if dispatch.counters.unwritten:
            return Verdict("result", f"{dispatch.counters.unwritten} bytes never stored to")
        results.append(np.array(dispatch.outputs[0]))
    if np.isnan(results[0]).any():
        return Verdict("result", "NaN from memory that nothing was stored to")
    if any(not np.array_equal(results[0], other) for other in results[1:]):
        return Verdict("result", "the order of threads changes the result")
    return Verdict("not caught", "")


I = "uint i = thread_position_in_grid.x; "  # noqa: E741
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup); "
BARRIER_DEVICE = "threadgroup_barrier(mem_flags::mem_device); "


def _address_spaces() -> Iterator[Plant]:
    yield Plant(
        "device pointer assigned to a threadgroup pointer", "compile", "address space",
        I + "threadgroup float t[64]; threadgroup float* p = t; p = a; o[i] = p[0];",
        I + "threadgroup float t[64]; threadgroup float* p = t; p[i] = a[i]; o[i] = p[i];",
    )  # fmt: skip
    yield Plant(
        "device pointer passed as a thread pointer", "compile", "no matching function",
        I + "o[i] = f(a);", I + "o[i] = f(a);",
        "inline float f(const thread float* p) { return p[0]; }",
        "inline float f(const device float* p) { return p[0]; }",
    )  # fmt: skip
    yield Plant(
        "device pointer passed as an unqualified pointer (an error up to Metal 4.0)", "compile",
        "4.0 and older", I + "o[i] = f(a);", I + "o[i] = f(a);",
        "inline float f(const float* p) { return p[0]; }",
        "template <typename P> inline float f(P p) { return p[0]; }",
    )  # fmt: skip
    yield Plant(
        "threadgroup pointer passed as a device pointer", "compile", "no matching function",
        I + "threadgroup float t[64]; t[i] = a[i]; o[i] = f(t, i);",
        I + "threadgroup float t[64]; t[i] = a[i]; o[i] = f(t, i);",
        "inline float f(const device float* p, uint i) { return p[i]; }",
        "inline float f(const threadgroup float* p, uint i) { return p[i]; }",
    )  # fmt: skip
    yield Plant(
        "method returns thread& without a trailing `thread` (an error in Metal 4.1)", "compile",
        "address space",
        I + "A q; q.at(0) = 1; o[i] = q.v[0];", I + "A q; q.at(0) = 1; o[i] = q.v[0];",
        "struct A { float v[2]; thread float& at(int i) { return v[i]; } };",
        "struct A { float v[2]; thread float& at(int i) thread { return v[i]; } };",
    )  # fmt: skip
    yield Plant(
        "helper for device memory, given an input of fewer than 8 elements", "compile",
        "no matching function", I + "o[i] = f(a, i & 3);", I + "o[i] = f(a, i & 3);",
        "inline float f(const device float* p, uint i) { return p[i]; }",
        "template <typename P> inline float f(P p, uint i) { return p[i]; }", size=4,
    )  # fmt: skip
    yield Plant(
        "store to an input", "compile", "read-only", I + "a[i] = 1; o[i] = 0;",
        I + "o[i] = 1;",
    )  # fmt: skip
    yield Plant(
        "store to an input, its const cast away", "run", "is an input",
        I + "((device float*)a)[i] = 1; o[i] = 0;", I + "((device float*)o)[i] = 1;",
    )  # fmt: skip
    yield Plant(
        "store to a table in constant memory", "compile", "read-only",
        I + "k[1] = 3; o[i] = k[i & 1];", I + "o[i] = k[i & 1];",
        "constant float k[2] = {1, 2};",
    )  # fmt: skip


def _language() -> Iterator[Plant]:
    yield Plant(
        "threadgroup variable in a helper", "compile", "local address space",
        I + "o[i] = f(a[i], i);", I + "threadgroup float t[64]; o[i] = f(t, a[i], i);",
        "inline float f(float x, uint i) { threadgroup float t[64]; t[i] = x; return t[i]; }",
        "inline float f(threadgroup float* t, float x, uint i) { t[i] = x; return t[i]; }",
    )  # fmt: skip
    yield Plant(
        "threadgroup variable with an initialiser", "compile", "initializer",
        I + "threadgroup float t[64] = {0}; o[i] = t[i];",
        I + "threadgroup float t[64]; t[i] = 0; o[i] = t[i];",
    )  # fmt: skip
    yield Plant(
        "float to bfloat without a cast", "compile", "bfloat",
        I + "bfloat b = a[i] * 2.0f; o[i] = float(b);",
        I + "bfloat b = bfloat(a[i] * 2.0f); o[i] = float(b);",
    )  # fmt: skip
    yield Plant(
        "max of int and uint", "compile", "ambiguous",
        I + "o[i] = max(int(a[i]), 3u);", I + "o[i] = max(int(a[i]), 3);",
    )  # fmt: skip
    yield Plant(
        "float4 of three components", "compile", "number of components",
        I + "float4 v = float4(a[i], 1, 2); o[i] = v.x;",
        I + "float4 v = float4(a[i], 1, 2, 3); o[i] = v.x;",
    )  # fmt: skip
    yield Plant(
        "component that a vector does not have", "compile", "vector component",
        I + "float2 v = float2(a[i], 1); o[i] = v.z;",
        I + "float2 v = float2(a[i], 1); o[i] = v.y;",
    )  # fmt: skip
    yield Plant(
        "float4 assigned to float3", "compile", "cannot initialize",
        I + "float3 v = float4(a[i]); o[i] = v.x;", I + "float3 v = float4(a[i]).xyz; o[i] = v.x;",
    )  # fmt: skip
    yield Plant(
        "double", "compile", "poisoned", I + "double d = a[i]; o[i] = float(d);",
        I + "float d = a[i]; o[i] = float(d);",
    )  # fmt: skip
    yield Plant(
        "dynamic allocation", "compile", "poisoned",
        I + "thread float* p = new float[4]; o[i] = p[0];", I + "float p[4] = {0}; o[i] = p[0];",
    )  # fmt: skip
    yield Plant(
        "recursion", "compile", "recursion", I + "o[i] = f(int(a[5]));", I + "o[i] = f(int(a[5]));",
        "inline int f(int n) { return n < 2 ? 1 : n * f(n - 1); }",
        "inline int f(int n) { int r = 1; for (; n > 1; n--) r *= n; return r; }",
    )  # fmt: skip
    yield Plant(
        "two functions that call each other", "compile", "recursion",
        I + "o[i] = even(int(a[i]));", I + "o[i] = even(int(a[i]));",
        "int odd(int n); int even(int n) { return n == 0 ? 1 : odd(n - 1); }"
        "int odd(int n) { return n == 0 ? 0 : even(n - 1); }",
        "int even(int n) { return n % 2 == 0; }",
    )  # fmt: skip
    yield Plant(
        "misspelt position", "compile", "undeclared",
        "o[thread_position_in_gridd.x] = 1;", "o[thread_position_in_grid.x] = 1;",
    )  # fmt: skip
    yield Plant(
        "variable called `vertex`", "compile", "poisoned",
        I + "float vertex = 1; o[i] = vertex;", I + "float corner = 1; o[i] = corner;",
    )  # fmt: skip
    yield Plant(
        "function constant, which mx.fast.metal_kernel cannot set", "compile", "initialized",
        I + "o[i] = flag ? 1 : 0;", I + "o[i] = flag ? 1 : 0;",
        "constant bool flag [[function_constant(0)]];", "constant bool flag = true;",
    )  # fmt: skip
    yield Plant(
        "variable outside the kernel that is not constant", "compile", "not constant",
        I + "calls += 1; o[i] = calls;", I + "o[i] = calls;",
        "device int calls = 0;", "constant int calls = 1;",
    )  # fmt: skip
    yield Plant(
        "static variable in a function", "compile", "not constant",
        I + "o[i] = f();", I + "o[i] = f();",
        "inline int f() { static device int calls = 0; return ++calls; }",
        "inline int f() { int calls = 0; return ++calls; }",
    )  # fmt: skip
    yield Plant(
        "virtual function", "compile", "poisoned",
        I + "A q; o[i] = q.f();", I + "A q; o[i] = q.f();",
        "struct A { virtual float f() { return 1; } };", "struct A { float f() { return 1; } };",
    )  # fmt: skip
    yield Plant(
        "exception", "compile", "poisoned", I + "try { o[i] = 1; } catch (...) { }", I + "o[i] = 1;"
    )
    yield Plant(
        "goto", "compile", "poisoned", I + "o[i] = 1; goto end; end: o[i] = 2;", I + "o[i] = 2;"
    )
    yield Plant(
        "function pointer", "compile", "pointers to functions",
        I + "float (*g)(float) = f; o[i] = g(a[i]);", I + "o[i] = f(a[i]);",
        "inline float f(float x) { return x + 1; }",
    )  # fmt: skip
    yield Plant(
        "path without a return", "compile", "non-void function",
        I + "o[i] = f(a[i]);", I + "o[i] = f(a[i]);",
        "inline float f(float x) { if (x > 3) return 1; }",
        "inline float f(float x) { if (x > 3) return 1; return 0; }",
    )  # fmt: skip
    yield Plant(
        "local variable used before it is set", "compile", "uninitialized",
        I + "float s; s += a[i]; o[i] = s;", I + "float s = 0; s += a[i]; o[i] = s;",
    )  # fmt: skip
    yield Plant(
        "local variable set on one path only", "compile", "uninitialized",
        I + "float s; if (a[i] > 3) s = 1; o[i] = s;",
        I + "float s = 0; if (a[i] > 3) s = 1; o[i] = s;",
    )  # fmt: skip
    yield Plant(
        "element of a local array never set", "result", "NaN",
        I + "float s[4]; for (int j = 1; j < 4; j++) s[j] = j; o[i] = s[i % 4];",
        I + "float s[4]; for (int j = 0; j < 4; j++) s[j] = j; o[i] = s[i % 4];",
    )  # fmt: skip
    yield Plant(
        "index beyond a threadgroup array, known to the compiler", "compile", "past the end",
        I + "threadgroup float t[64]; t[i] = a[i]; t[64] = 1; o[i] = t[i];",
        I + "threadgroup float t[65]; t[i] = a[i]; if (i == 0) t[64] = 1; o[i] = t[i];",
    )  # fmt: skip
    yield Plant(
        "simd_sum of a 64-bit integer", "compile", "nothing of 64 bits",
        I + "o[i] = simd_sum(long(a[i]));", I + "o[i] = simd_sum(int(a[i]));",
    )  # fmt: skip
    yield Plant(
        "simd_xor of a float", "compile", "take integers",
        I + "o[i] = simd_xor(a[i]);", I + "o[i] = simd_xor(int(a[i]));",
    )  # fmt: skip
    yield Plant(
        "atomic float in threadgroup memory", "compile", "device memory only",
        I + "threadgroup atomic_float t; if (i == 0) atomic_store_explicit(&t, 0.0f, "
        "memory_order_relaxed); o[i] = 0;",
        I + "threadgroup atomic_int t; if (i == 0) atomic_store_explicit(&t, 0, "
        "memory_order_relaxed); o[i] = 0;",
    )  # fmt: skip
    yield Plant(
        "atomic maximum of floats", "compile", "has no max",
        I + "o[i] = 0; atomic_fetch_max_explicit((device atomic_float*)o + i, 1.0f, "
        "memory_order_relaxed);",
        I + "o[i] = 0; atomic_fetch_max_explicit((device atomic_int*)o + i, 1, "
        "memory_order_relaxed);",
    )  # fmt: skip
    yield Plant(
        "character that is not ASCII", "compile", "ASCII",
        I + "o[i] = 1; // d\u00e9j\u00e0", I + "o[i] = 1; // deja",
    )  # fmt: skip
    yield Plant(
        "threadgroup memory over 32 KiB", "compile", "36000 bytes",
        I + "threadgroup float t[9000]; t[i] = a[i]; " + BARRIER + "o[i] = t[63 - i];",
        I + "threadgroup float t[8192]; t[i] = a[i]; " + BARRIER + "o[i] = t[63 - i];",
    )  # fmt: skip


def _memory() -> Iterator[Plant]:
    yield Plant(
        "load one past the input", "run", "0 bytes past its end",
        I + "o[i] = a[i + 1];", I + "o[i] = a[i];",
    )  # fmt: skip
    yield Plant(
        "load before the input", "run", "4 bytes before its start",
        I + "o[i] = a[int(i) - 1];", I + "o[i] = a[max(int(i) - 1, 0)];",
    )  # fmt: skip
    yield Plant(
        "unsigned index that wraps below zero", "run", "belongs to no buffer",
        I + "o[i] = a[i - 1];", I + "o[i] = i ? a[i - 1] : 0;",
    )  # fmt: skip
    yield Plant(
        "store past the output", "run", "past its end",
        I + "o[i + 1] = a[i];", I + "o[i] = a[i];",
    )  # fmt: skip
    yield Plant(
        "vector load across the end of the input", "run", "across its end",
        I + "float4 v = 0; if (i < 16) v = ((const device float4*)a)[i]; o[i] = dot(v, v);",
        I + "float4 v = 0; if (i < 15) v = ((const device float4*)a)[i]; o[i] = dot(v, v);",
        size=62,
    )  # fmt: skip
    yield Plant(
        "vector load that is not aligned", "run", "not aligned to 16",
        I + "const device float4* p = (const device float4*)(a + i % 8); o[i] = p[0].x;",
        I + "const device float4* p = (const device float4*)(a + i % 8 * 4); o[i] = p[0].x;",
    )  # fmt: skip
    yield Plant(
        "scalar load that is not aligned", "run", "not aligned to 4",
        I + "o[i] = *(const device float*)((const device char*)a + i);",
        I + "o[i] = *(const device float*)((const device char*)a + i / 4 * 4);",
    )  # fmt: skip
    yield Plant(
        "pointer made of a number", "run", "belongs to no buffer",
        I + "const device float* p = (const device float*)(ulong(a[i]) + 4096); o[i] = p[0];",
        I + "const device float* p = a + ulong(a[i]); o[i] = p[0];",
    )  # fmt: skip
    yield Plant(
        "index beyond a threadgroup array", "run", "out of bounds for type",
        I + "threadgroup float t[32]; t[i] = 1; " + BARRIER + "o[i] = t[i % 32];",
        I + "threadgroup float t[32]; if (i < 32) t[i] = 1; " + BARRIER + "o[i] = t[i % 32];",
    )  # fmt: skip
    yield Plant(
        "pointer beyond a threadgroup array, towards its neighbour", "run", "past its end",
        I + "threadgroup float t[32]; threadgroup float u[32]; if (i < 32) t[i] = u[i] = 0; "
        + BARRIER + "threadgroup float* p = t; o[i] = p[i];",
        I + "threadgroup float t[64]; threadgroup float u[32]; t[i] = 0; if (i < 32) u[i] = 0; "
        + BARRIER + "threadgroup float* p = t; o[i] = p[i];",
    )  # fmt: skip
    yield Plant(
        "pointer before a threadgroup array", "run", "before its start",
        I + "threadgroup float t[64]; t[i] = 0; threadgroup float* p = t; o[i] = p[int(i) - 1];",
        I + "threadgroup float t[64]; t[i] = 0; threadgroup float* p = t; o[i] = p[int(i)];",
    )  # fmt: skip
    yield Plant(
        "index beyond a local array", "run", "out of bounds for type",
        I + "float s[4] = {1, 2, 3, 4}; o[i] = s[i % 5];",
        I + "float s[4] = {1, 2, 3, 4}; o[i] = s[i % 4];",
    )  # fmt: skip
    yield Plant(
        "local array too large for a thread", "run", "overflows",
        I + "float s[50000]; for (int j = 0; j < 50000; j++) s[j] = a[i]; o[i] = s[int(a[i])];",
        I + "float s[500]; for (int j = 0; j < 500; j++) s[j] = a[i]; o[i] = s[int(a[i])];",
    )  # fmt: skip
    yield Plant(
        "threadgroup memory never stored to", "result", "NaN",
        I + "threadgroup float t[64]; if (i < 32) t[i] = a[i]; " + BARRIER + "o[i] = t[i];",
        I + "threadgroup float t[64]; t[i] = i < 32 ? a[i] : 0; " + BARRIER + "o[i] = t[i];",
    )  # fmt: skip
    yield Plant(
        "output element never stored to", "result", "4 bytes never stored",
        I + "if (i != 5) o[i] = a[i];", I + "o[i] = i == 5 ? 0 : a[i];",
    )  # fmt: skip
    yield Plant(
        "output used as if it were zero", "result", "NaN",
        I + "o[i] += a[i];", I + "o[i] = a[i];",
    )  # fmt: skip
    yield Plant(
        "integer division by zero", "run", "division by zero",
        I + "o[i] = 100 / int(a[i]);", I + "o[i] = 100 / max(int(a[i]), 1);",
    )  # fmt: skip
    yield Plant(
        "integer remainder by zero", "run", "division by zero",
        I + "o[i] = i % uint(a[i]);", I + "o[i] = i % (uint(a[i]) + 1);",
    )  # fmt: skip


def _races() -> Iterator[Plant]:
    yield Plant(
        "no barrier", "run", "race",
        I + "threadgroup float t[64]; t[i] = a[i]; o[i] = t[63 - i];",
        I + "threadgroup float t[64]; t[i] = a[i]; " + BARRIER + "o[i] = t[63 - i];",
    )  # fmt: skip
    yield Plant(
        "no second barrier in a loop (store after load)", "run", "race",
        I + "threadgroup float t[64]; float s = 0; for (int j = 0; j < 3; j++) { t[i] = a[i] + j; "
        + BARRIER + "s += t[63 - i]; } o[i] = s;",
        I + "threadgroup float t[64]; float s = 0; for (int j = 0; j < 3; j++) { t[i] = a[i] + j; "
        + BARRIER + "s += t[63 - i]; " + BARRIER + "} o[i] = s;",
    )  # fmt: skip
    yield Plant(
        "no barrier within a simdgroup", "run", "race",
        I + "threadgroup float t[32]; t[i] = a[i]; o[i] = t[31 - i];",
        I + "threadgroup float t[32]; t[i] = a[i]; "
        "simdgroup_barrier(mem_flags::mem_threadgroup); o[i] = t[31 - i];", threads=32, group=32,
    )  # fmt: skip
    yield Plant(
        "simd_sum in place of a barrier", "run", "race",
        I + "threadgroup float t[64]; t[i] = a[i]; float s = simd_sum(a[i]); o[i] = t[i ^ 1] + s;",
        I + "threadgroup float t[64]; t[i] = a[i]; float s = simd_sum(a[i]); "
        "simdgroup_barrier(mem_flags::mem_threadgroup); o[i] = t[i ^ 1] + s;",
    )  # fmt: skip
    yield Plant(
        "simdgroup_barrier between simdgroups", "run", "race",
        I + "threadgroup float t[64]; t[i] = a[i]; "
        "simdgroup_barrier(mem_flags::mem_threadgroup); o[i] = t[63 - i];",
        I + "threadgroup float t[64]; t[i] = a[i]; "
        "simdgroup_barrier(mem_flags::mem_threadgroup); o[i] = t[i ^ 31];",
    )  # fmt: skip
    yield Plant(
        "barrier without a memory flag", "run", "race",
        I + "threadgroup float t[64]; t[i] = a[i]; threadgroup_barrier(mem_flags::mem_none); "
        "o[i] = t[63 - i];",
        I + "threadgroup float t[64]; t[i] = a[i]; threadgroup_barrier(mem_flags::mem_device | "
        "mem_flags::mem_threadgroup); o[i] = t[63 - i];",
    )  # fmt: skip
    yield Plant(
        "barrier of device memory for threadgroup memory", "run", "race",
        I + "threadgroup float t[64]; t[i] = a[i]; " + BARRIER_DEVICE + "o[i] = t[63 - i];",
        I + "threadgroup float t[64]; t[i] = a[i]; " + BARRIER + "o[i] = t[63 - i];",
    )  # fmt: skip
    yield Plant(
        "all threads store to one variable", "run", "race",
        I + "threadgroup float t; t = a[i]; " + BARRIER + "o[i] = t;",
        I + "threadgroup float t; if (i == 63) t = a[i]; " + BARRIER + "o[i] = t;",
    )  # fmt: skip
    yield Plant(
        "device memory between threads without a barrier", "run", "race",
        I + "o[i] = a[i]; o[i] = i < 32 ? o[i + 32] : 0;",
        I + "o[i] = a[i]; " + BARRIER_DEVICE + "float x = o[i ^ 1]; "
        + BARRIER_DEVICE + "o[i] = x;",
    )  # fmt: skip
    yield Plant(
        "device memory between threadgroups", "run", "threadgroups before",
        I + "o[i] = a[i]; " + BARRIER_DEVICE + "float x = o[i % 32]; "
        + BARRIER_DEVICE + "o[i] = x;",
        I + "o[i] = a[i]; " + BARRIER_DEVICE + "float x = o[i ^ 1]; "
        + BARRIER_DEVICE + "o[i] = x;",
        group=32,
    )  # fmt: skip
    yield Plant(
        "two threadgroups store to one element", "run", "race",
        I + "o[i] = a[i]; if (i % 32 == 0) o[5] = 3;", I + "o[i] = i == 5 ? 3 : a[i];", group=32,
    )  # fmt: skip
    yield Plant(
        "counter without atomics", "run", "race",
        I + "o[i] = 0; " + BARRIER_DEVICE + "device int* n = (device int*)o; n[0] += 1;",
        I + "o[i] = 0; " + BARRIER_DEVICE + "atomic_fetch_add_explicit((device atomic_int*)o, 1, "
        "memory_order_relaxed);",
    )  # fmt: skip
    yield Plant(
        "atomic and plain stores to one word", "run", "race",
        I + "threadgroup atomic_int n; if (i == 0) atomic_store_explicit(&n, 0, "
        "memory_order_relaxed); " + BARRIER + "if (i == 40) *(threadgroup int*)&n = 1; else "
        "atomic_fetch_add_explicit(&n, 1, memory_order_relaxed); o[i] = 0;",
        I + "threadgroup atomic_int n; if (i == 0) atomic_store_explicit(&n, 0, "
        "memory_order_relaxed); " + BARRIER + "atomic_fetch_add_explicit(&n, 1, "
        "memory_order_relaxed); " + BARRIER + "o[i] = *(threadgroup int*)&n;",
    )  # fmt: skip


def _meeting() -> Iterator[Plant]:
    yield Plant(
        "barrier that some threads skip", "run", "returned",
        I + "if (i < 40) threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = 1;",
        I + "threadgroup_barrier(mem_flags::mem_threadgroup); if (i < 40) o[i] = 1; else o[i] = 2;",
    )  # fmt: skip
    yield Plant(
        "barrier after some threads returned", "run", "returned",
        I + "o[i] = 0; if (i >= 50) return; " + BARRIER + "o[i] = 1;",
        I + "o[i] = 0; " + BARRIER + "if (i >= 50) return; o[i] = 1;",
    )  # fmt: skip
    yield Plant(
        "two barriers, one a branch", "run", "different barriers",
        I + "threadgroup float t[64]; t[i] = 0; if (i < 32) { " + BARRIER + "t[i] = 1; } else { "
        + BARRIER + "t[i] = 2; } o[i] = t[i];",
        I + "threadgroup float t[64]; t[i] = 0; " + BARRIER
        + "if (i < 32) t[i] = 1; else t[i] = 2; o[i] = t[i];",
    )  # fmt: skip
    yield Plant(
        "barrier in a loop of unequal length", "run", "returned",
        I + "for (uint j = 0; j <= i / 32; j++) threadgroup_barrier(mem_flags::mem_threadgroup); "
        "o[i] = 1;",
        I + "for (uint j = 0; j < 2; j++) threadgroup_barrier(mem_flags::mem_threadgroup); "
        "o[i] = 1;",
    )  # fmt: skip
    yield Plant(
        "simd_sum that some lanes skip", "run", "without all 32 lanes",
        I + "float s = 0; if (i % 2) s = simd_sum(a[i]); o[i] = s;",
        I + "float s = simd_sum(i % 2 ? a[i] : 0.0f); o[i] = s;", strict=True,
    )  # fmt: skip
    yield Plant(
        "two simdgroup functions, one a branch", "run", "different simdgroup operations",
        I + "float s; if (i % 32 < 16) s = simd_sum(a[i]); else s = simd_max(a[i]); o[i] = s;",
        I + "float s = simd_sum(a[i]), m = simd_max(a[i]); o[i] = i % 32 < 16 ? s : m;",
    )  # fmt: skip
    yield Plant(
        "simd_sum meets a barrier", "run", "deadlock",
        I + "float s = 0; if (i % 32 < 16) s = simd_sum(a[i]); " + BARRIER + "o[i] = s;",
        I + "float s = simd_sum(i % 32 < 16 ? a[i] : 0.0f); " + BARRIER + "o[i] = s;",
    )  # fmt: skip
    yield Plant(
        "shuffle from a lane that returned", "run", "lane 25",
        I + "o[i] = 0; if (i % 32 >= 20) return; o[i] = simd_shuffle(a[i], 25);",
        I + "o[i] = 0; if (i % 32 >= 26) return; o[i] = simd_shuffle(a[i], 25);",
    )  # fmt: skip
    yield Plant(
        "shuffle from a lane beyond the last of a short simdgroup", "run", "lane",
        I + "o[i] = simd_shuffle_xor(a[i], 8);", I + "o[i] = simd_shuffle_xor(a[i], 1);",
        threads=40, group=40,
    )  # fmt: skip
    yield Plant(
        "broadcast from lane 40", "run", "lane 40",
        I + "o[i] = simd_broadcast(a[i], 40);", I + "o[i] = simd_broadcast(a[i], 8);",
    )  # fmt: skip
    tile = I + (
        "threadgroup float t[256]; for (int j = i; j < 256; j += 64) t[j] = 0; " + BARRIER
        + "simdgroup_float8x8 m; "
    )  # fmt: skip
    yield Plant(
        "simdgroup_load with an address that differs by lane", "run", "the same in all lanes",
        tile + "simdgroup_load(m, t + i % 32, 8); o[i] = m.thread_elements()[0];",
        tile + "simdgroup_load(m, t + i / 32, 8); o[i] = m.thread_elements()[0];",
    )  # fmt: skip
    yield Plant(
        "simdgroup_matrix in a short simdgroup", "run", "without all 32 lanes",
        I + "simdgroup_float8x8 m(1.0f), n(2.0f), r; simdgroup_multiply(r, m, n); "
        "o[i] = r.thread_elements()[0];",
        I + "simdgroup_float8x8 m(1.0f), n(2.0f), r; simdgroup_multiply(r, m, n); "
        "o[i] = r.thread_elements()[0];",
        threads=48, group=48, twin_threads=64, twin_group=64,
    )  # fmt: skip
    yield Plant(
        "threadgroup of 2048 threads", "run", "more than 1024",
        I + "o[i] = 1;", I + "o[i] = 1;", threads=2048, group=2048, twin_group=1024,
    )  # fmt: skip
    yield Plant(
        "grid of nothing", "run", "at least 1",
        I + "o[i] = 1;", I + "o[i] = 1;", threads=0, twin_threads=1,
    )  # fmt: skip


PLANTS: tuple[Plant, ...] = (
    *_address_spaces(),
    *_language(),
    *_memory(),
    *_races(),
    *_meeting(),
)
