#!/bin/sh
# Builds a native test with given compiler and flags: build.sh OUT "COMPILER" "FLAGS" TEST.cpp
# Tests called train_… are of training's sources, the others of the engine's.
set -e
out=$1 compiler=$2 flags=$3 test=$4
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
common="-std=c++17 -ffp-contract=off -Wall -Wextra -I$root $flags"
case $(basename "$test") in
  train_*)
    kind=train
    plain="$root/core/cpu_features.cpp $root/core/lending.cpp $root/core/memory.cpp
      $root/core/threads.cpp
      $root/train/dispatch.cpp $root/train/model.cpp $root/train/store.cpp $root/train/workspace.cpp
      $(echo "$root"/train/trainer*.cpp)"
    ;;
  *)
    kind=simd
    plain=$(echo "$root"/core/*.cpp)
    ;;
esac
# shellcheck disable=SC2086  # flags are words
isa() { $compiler $common $2 -c "$root/$kind/$1.cpp" -o "$work/$1.o"; }
isa scalar ""
case $kind-$($compiler -dumpmachine) in
  *-x86_64*)
    avx2="-mavx2 -mfma -mf16c"
    avx512="$avx2 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx512vnni -Wno-maybe-uninitialized"
    case $flags in
      *LOCALLLM_EMULATE*) avxvnni=$avx512 bfloat=$avx2 ;;
      *) avxvnni="$avx2 -mavxvnni" bfloat="$avx512 -mavx512bf16" ;;
    esac
    isa avx2 "$avx2"
    if [ $kind = simd ]; then
      isa avxvnni "$avxvnni"
      isa avx512vnni "$avx512"
      isa amx "$avx512"
    else
      isa avx512 "$avx512"
      isa avx512bf16 "$bfloat"
      isa amxbf16 "$bfloat"
    fi
    common="$common -DLOCALLLM_AVXVNNI -DLOCALLLM_AVX512BF16 -DLOCALLLM_AMX"
    ;;
  *-aarch64* | *-arm64*)
    isa neon "-march=armv8.2-a+dotprod"
    if [ $kind = simd ]; then isa neon_i8mm "-march=armv8.2-a+dotprod+i8mm"; fi
    ;;
esac
# shellcheck disable=SC2086
$compiler $common "$test" $plain "$work"/*.o -o "$out" -lpthread
