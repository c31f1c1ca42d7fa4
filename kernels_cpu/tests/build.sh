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
    isa avx2 "-mavx2 -mfma -mf16c"
    ;;
  aarch64* | arm64*)
    isa neon "-march=armv8.2-a+dotprod"
    isa neon_i8mm "-march=armv8.2-a+dotprod+i8mm"
    ;;
esac
# shellcheck disable=SC2086
$compiler $common "$test" "$root"/core/*.cpp "$work"/*.o -o "$out" -lpthread
