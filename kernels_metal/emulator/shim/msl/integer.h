#pragma once
namespace metal {
MSL_FN uint popcount(uint x) { return __builtin_popcount(x); }
MSL_FN int popcount(int x) { return __builtin_popcount((uint)x); }
MSL_FN ulong popcount(ulong x) { return __builtin_popcountl(x); }
MSL_FN ushort popcount(ushort x) { return (ushort)__builtin_popcount(x); }
MSL_FN uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
MSL_FN int clz(int x) { return x ? __builtin_clz((uint)x) : 32; }
MSL_FN ushort clz(ushort x) { return x ? (ushort)(__builtin_clz(x) - 16) : 16; }
MSL_FN ulong clz(ulong x) { return x ? __builtin_clzl(x) : 64; }
MSL_FN uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
MSL_FN int ctz(int x) { return x ? __builtin_ctz((uint)x) : 32; }
MSL_FN ulong ctz(ulong x) { return x ? __builtin_ctzl(x) : 64; }
MSL_FN uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
MSL_FN uint rotate(uint x, uint k) { k &= 31; return k ? x << k | x >> (32 - k) : x; }
MSL_FN uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
MSL_FN int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
MSL_FN uint mad24(uint a, uint b, uint c) { return (a & 0xffffff) * (b & 0xffffff) + c; }
MSL_FN int mad24(int a, int b, int c) { return a * b + c; }
MSL_FN uint absdiff(int a, int b) { return a > b ? (uint)a - (uint)b : (uint)b - (uint)a; }
MSL_FN uint absdiff(uint a, uint b) { return a > b ? a - b : b - a; }
MSL_FN uint addsat(uint a, uint b) { uint s = a + b; return s < a ? ~0u : s; }
MSL_FN uint subsat(uint a, uint b) { return a > b ? a - b : 0u; }
MSL_FN uint extract_bits(uint x, uint offset, uint bits) {
  return bits ? x >> offset & (bits >= 32 ? ~0u : (1u << bits) - 1) : 0;
}
MSL_FN int extract_bits(int x, uint offset, uint bits) {
  return bits ? (int)((uint)x << (32 - offset - bits)) >> (32 - bits) : 0;
}
MSL_FN uint insert_bits(uint base, uint x, uint offset, uint bits) {
  uint mask = (bits >= 32 ? ~0u : (1u << bits) - 1) << offset;
  return (base & ~mask) | (x << offset & mask);
}
MSL_FN float2 unpack_half2x16_to_float(uint v) {
  return (float2){(float)as_type<half>((ushort)v), (float)as_type<half>((ushort)(v >> 16))};
}
MSL_FN uint pack_float_to_half2x16(float2 v) {
  return (uint)as_type<ushort>((half)v[0]) | (uint)as_type<ushort>((half)v[1]) << 16;
}
MSL_FN float4 unpack_unorm4x8_to_float(uint v) {
  return (float4){(float)(v & 255), (float)(v >> 8 & 255), (float)(v >> 16 & 255),
                  (float)(v >> 24)} / 255.0f;
}
MSL_FN float4 unpack_snorm4x8_to_float(uint v) {
  float4 r;
  for (int i = 0; i < 4; i++) r[i] = __builtin_fmaxf((float)(char)(v >> 8 * i) / 127.0f, -1.0f);
  return r;
}
} // namespace metal
