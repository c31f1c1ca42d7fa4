// The vectors that go with products of bfloat16; emulated ones have AVX2's.
#pragma once

#ifdef LOCALLLM_EMULATE
#include "simd/vec_avx2.h"
#else
#include "simd/vec_avx512.h"
#endif
