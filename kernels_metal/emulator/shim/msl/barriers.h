#pragma once
namespace metal {
enum class mem_flags : uint {
  mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4,
  mem_threadgroup_imageblock = 8,
};
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
MSL_FN constexpr mem_flags operator&(mem_flags a, mem_flags b) { return (mem_flags)((uint)a & (uint)b); }
MSL_FN void threadgroup_barrier(mem_flags flags) { msl_threadgroup_barrier((uint)flags); }
MSL_FN void simdgroup_barrier(mem_flags flags) { msl_simdgroup_barrier((uint)flags); }
} // namespace metal
