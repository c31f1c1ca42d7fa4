#!/bin/sh
# Builds a native test with given compiler and flags: build.sh OUT "COMPILER" "FLAGS" TEST.cpp
set -e
out=$1 compiler=$2 flags=$3 test=$4
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
common="-std=c++17 -ffp-contract=off -Wall -Wextra -I$root $flags"
# shellcheck disable=SC2086  # flags are words
isa() { $compiler $common $2 -c "$root/simd/$1.cpp" -o "$work/$1.o"; }
isa scalar ""
case $($compiler -dumpmachine) in
  x86_64*)
    avx2="-mavx2 -mfma -mf16c"
    avx512="$avx2 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx512vnni -Wno-maybe-uninitialized"
    case $flags in
      *LOCALLLM_EMULATE*) avxvnni=$avx512 ;;
      *) avxvnni="$avx2 -mavxvnni" ;;
    esac
    isa avx2 "$avx2"
    isa avxvnni "$avxvnni"
    isa avx512vnni "$avx512"
    isa amx "$avx512"
    common="$common -DLOCALLLM_AVXVNNI -DLOCALLLM_AMX"
    ;;
  aarch64* | arm64*)
    isa neon "-march=armv8.2-a+dotprod"
    isa neon_i8mm "-march=armv8.2-a+dotprod+i8mm"
    ;;
esac
# shellcheck disable=SC2086
$compiler $common "$test" "$root"/core/*.cpp "$work"/*.o -o "$out" -lpthread
