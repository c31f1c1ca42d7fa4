"""The native tests: one arithmetic on every instruction set, and the sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

from localllm.kernels_cpu import _native

TESTS = Path(__file__).parents[2] / "kernels_cpu" / "tests"
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(out: Path, compiler: str, flags: str) -> Path:
    command = [str(TESTS / "build.sh"), str(out), compiler, flags, str(TESTS / "fingerprint.cpp")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scalar_kernels_are_always_there_and_listed_first():
    assert _native.usable_kernels()[0] == "scalar"


@pytest.mark.slow
@NEEDS_COMPILER
def test_every_instruction_set_chunking_batch_and_thread_count_gives_the_same_bits(tmp_path):
    lines = run(build(tmp_path / "fingerprint", "g++", "-O2")).splitlines()
    assert len(lines) >= 15


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.skipif("avx512_vnni" not in _native.usable_kernels(), reason="needs AVX512-VNNI")
def test_avx_vnni_and_amx_sources_give_the_same_bits_when_emulated(tmp_path):
    """The kernels as they are, over emulated tiles and AVX-512's form of the VNNI instruction."""
    run(build(tmp_path / "fingerprint", "g++", "-O2 -DLOCALLLM_EMULATE"))


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64",
)
def test_neon_gives_the_bits_of_this_machine(tmp_path):
    here = run(build(tmp_path / "here", "g++", "-O2"), "quick")
    arm = build(tmp_path / "arm", "aarch64-linux-gnu-g++", "-O2 -static")
    assert run("qemu-aarch64", arm, "quick") == here


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    flags = f"-O1 -g -fsanitize={sanitizer} -fno-sanitize-recover=all"
    run(build(tmp_path / "fingerprint", "g++", flags), "quick")


@NEEDS_COMPILER
@pytest.mark.skipif("avx2" not in _native.usable_kernels(), reason="needs an x86-64 with AVX2")
def test_no_avx2_code_can_be_linked_into_other_files(tmp_path):
    """A shared inline function compiled for AVX2 would be a trap on a machine without it."""
    root = TESTS.parent
    out = tmp_path / "avx2.o"
    flags = ["-std=c++17", "-O1", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=off"]
    subprocess.run(
        ["g++", *flags, f"-I{root}", "-c", str(root / "simd/avx2.cpp"), "-o", str(out)], check=True
    )
    defined = run("nm", "-C", "--defined-only", "--extern-only", out).splitlines()
    assert [line.split(maxsplit=2)[2] for line in defined] == ["localllm::kAvx2Kernels"]
