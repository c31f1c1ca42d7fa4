#!/bin/sh
# Builds a native test with given compiler and flags: build.sh OUT "COMPILER" "FLAGS" TEST.cpp
set -e
out=$1 compiler=$2 flags=$3 test=$4
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case $($compiler -dumpmachine) in
  x86_64*) isa=avx2 isa_flags="-mavx2 -mfma -mf16c" ;;
  aarch64* | arm64*) isa=neon isa_flags="-march=armv8.2-a+dotprod" ;;
esac
common="-std=c++17 -ffp-contract=off -Wall -Wextra -I$root $flags"
[ -z "$isa" ] || $compiler $common $isa_flags -c "$root/simd/$isa.cpp" -o "$work/$isa.o"
set -- "$work"/*.o
$compiler $common "$test" "$root"/core/*.cpp "$root/simd/scalar.cpp" "$@" -o "$out" -lpthread
