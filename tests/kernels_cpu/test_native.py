"""The native tests: one arithmetic on every instruction set, and the sanitizers."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from localllm.kernels_cpu import _native
from tests.examples import some

TESTS = Path(__file__).parents[2] / "kernels_cpu" / "tests"
ARM_COMPILER = "aarch64-linux-gnu-g++"

# Files compiled for an instruction set: the flags they get (see kernels_cpu/CMakeLists.txt).
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx512vnni"
X86 = {"avx2": AVX2, "avxvnni": f"{AVX2} -mavxvnni", "avx512vnni": AVX512, "amx": AVX512}
BFLOAT16 = f"{AVX512} -mavx512bf16"
TRAINING = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": BFLOAT16, "amxbf16": BFLOAT16}
ARM = {
    "neon": "-march=armv8.2-a+dotprod",
    "neon_i8mm": "-march=armv8.2-a+dotprod+i8mm",
}


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")


def build(out: Path, compiler: str, flags: str, test: str = "fingerprint") -> Path:
    command = [str(TESTS / "build.sh"), str(out), compiler, flags, str(TESTS / f"{test}.cpp")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """The fingerprint program of this machine."""
    return build(tmp_path_factory.mktemp("here") / "fingerprint", "g++", "-O2")


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Path:
    """The same for AArch64."""
    return build(tmp_path_factory.mktemp("arm") / "fingerprint", ARM_COMPILER, "-O2 -static")


def test_scalar_kernels_are_always_there_and_listed_first():
    assert _native.usable_kernels()[0] == "scalar"


@pytest.mark.slow
@needs("g++")
def test_every_instruction_set_chunking_batch_and_thread_count_gives_the_same_bits(here):
    assert len(run(here).splitlines()) >= 15


@pytest.mark.slow
@needs("g++")
@pytest.mark.skipif("avx512_vnni" not in _native.usable_kernels(), reason="needs AVX512-VNNI")
def test_avx_vnni_and_amx_sources_give_the_same_bits_when_emulated(tmp_path):
    """The kernels as they are, over emulated tiles and AVX-512's form of the VNNI instruction."""
    run(build(tmp_path / "fingerprint", "g++", "-O2 -DLOCALLLM_EMULATE"))


@pytest.mark.slow
@ON_X86
@needs("g++")
@pytest.mark.skipif("avx2" not in _native.train_kernels(), reason="needs AVX2")
@pytest.mark.parametrize(
    "flags", ["-O2", "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"]
)
def test_training_by_bfloat16_and_amx_is_right_when_emulated(tmp_path, flags):
    """Products against exact sums, gradients against the float32 kernels, whatever the threads."""
    out = build(tmp_path / "train", "g++", f"{flags} -DLOCALLLM_EMULATE", "train_kernels")
    assert "amx_bf16" in run(out)


@pytest.mark.slow
@needs("g++", ARM_COMPILER, "qemu-aarch64")
@pytest.mark.parametrize(
    ("processor", "kernels"),
    [
        ("max", ["scalar", "neon", "neon_i8mm"]),
        ("cortex-a76", ["scalar", "neon"]),
        ("cortex-a53", ["scalar"]),
    ],
)
def test_every_arm_processor_gives_the_bits_of_this_machine(here, arm, processor, kernels):
    on_arm = ["qemu-aarch64", "-cpu", processor, arm]
    assert run(*on_arm, "kernels").split() == kernels
    assert run(*on_arm, "quick") == run(here, "quick")


@pytest.mark.slow
@ON_X86
@needs("g++", "qemu-x86_64")
def test_a_processor_without_avx2_runs_the_scalar_kernels_and_gives_the_same_bits(here):
    old = ["qemu-x86_64", "-cpu", "Nehalem", here]
    assert run(*old, "kernels").split() == ["scalar"]
    some = ["quick", "q4-bias", "q6-group16", "q8", "kv8"]  # all of them take minutes
    assert run(*old, *some) == run(here, *some)


@pytest.mark.slow
@ON_X86
@needs("g++")
def test_no_feature_is_claimed_that_the_system_does_not_save(tmp_path):
    run(build(tmp_path / "features", "g++", "-O1", "features"))


@needs("g++")
def test_steps_run_on_one_thread_while_that_is_quicker(tmp_path):
    run(built_alone(tmp_path, "governor", "governor"))


@needs("g++")
def test_threads_rest_while_their_cores_are_lent(tmp_path):
    run(built_alone(tmp_path, "lending", "lending", "threads", "cpu_count"))


def built_alone(folder: Path, test: str, *core: str) -> Path:
    """A test of a few files of the core, which take a second to build."""
    root, out = TESTS.parent, folder / test
    sources = [TESTS / f"{test}.cpp", *(root / "core" / f"{name}.cpp" for name in core)]
    options = ["-std=c++17", "-O1", "-pthread", f"-I{root}"]
    subprocess.run(["g++", *options, *sources, "-o", out], check=True)
    return out


@pytest.mark.slow
@needs("g++")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize(("test", "arguments"), [("fingerprint", ["quick"]), ("cancel", [])])
def test_sanitizers_find_nothing(tmp_path, sanitizer, test, arguments):
    flags = f"-O1 -g -fsanitize={sanitizer} -fno-sanitize-recover=all"
    run(build(tmp_path / test, "g++", flags, test), *arguments)


def test_every_instruction_set_is_checked_for_code_that_could_leak():
    files = {file.stem for file in (TESTS.parent / "simd").glob("*.cpp")}
    assert files - {"scalar"} == {*X86, *ARM}


@pytest.mark.parametrize("name", some([*X86, *ARM], 3))
@pytest.mark.parametrize("level", ["-O0", pytest.param("-O2", marks=pytest.mark.slow)])
def test_no_code_for_an_instruction_set_can_be_linked_into_other_files(tmp_path, name, level):
    """A shared inline function compiled for AVX2 would be a trap on a machine without it."""
    kind = "matmul" if name == "amx" else "kernels"
    assert exported(tmp_path, f"simd/{name}.cpp", level, (X86 | ARM)[name], name in X86) == [
        f"localllm::k{name.replace('_', '')}{kind}"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_nor_can_training_s(tmp_path, name, level):
    assert exported(tmp_path, f"train/{name}.cpp", level, TRAINING[name], True) == [
        f"localllm::train::k{name}"
    ]


def exported(tmp_path: Path, source: str, level: str, flags: str, x86: bool) -> list[str]:
    """What other files could be linked to of a file compiled so, in lower case."""
    compiler = "g++" if (platform.machine() == "x86_64") == x86 else None
    compiler = compiler or ("x86_64-linux-gnu-g++" if x86 else ARM_COMPILER)
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    out = tmp_path / "object.o"
    options = ["-std=c++17", level, "-ffp-contract=off", *flags.split(), f"-I{TESTS.parent}"]
    subprocess.run(
        [compiler, *options, "-c", str(TESTS.parent / source), "-o", str(out)], check=True
    )
    nm = compiler.removesuffix("g++") + "nm"
    symbols = run(nm, "-C", "--defined-only", "--extern-only", out).splitlines()
    names = [line.split(maxsplit=2)[2] for line in symbols]
    return [n.lower() for n in names if n != "DW.ref.__gxx_personality_v0"]  # the runtime's data
