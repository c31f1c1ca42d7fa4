"""Machines that refuse something: the native engine runs on, slower, or says what is missing."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.backend.test_cpu import logits, small

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

START = """
import ctypes, hashlib, resource
import numpy as np
from localllm.errors import OutOfMemoryPlan
from tests.backend.conformance import Sequence, run
from tests.backend.random_models import llama
from tests.backend.test_cpu import logits, small

def digest(values):
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()

def leave_only(megabytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

def lift():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def in_a_process(code: str, **environment: str) -> list[str]:
    """What `code` prints in a process of its own, whose limits end with it."""
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.fixture(scope="module")
def wanted() -> str:
    return hashlib.sha256(np.ascontiguousarray(logits(small())).tobytes()).hexdigest()


def test_without_huge_pages_the_answer_is_the_same(wanted):
    code = """
PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
print(digest(logits(small())))
"""
    assert in_a_process(code) == [wanted]


def test_too_little_memory_for_the_weights_is_said(wanted):
    code = """
small()  # all that is imported late
leave_only(32)
try:
    small()
except OutOfMemoryPlan as error:
    print(error, "|", error.hint)
lift()
print(digest(logits(small())))
"""
    said, after = in_a_process(code)
    assert "no memory for the weights" in said
    assert "smaller model" in said
    assert after == wanted


def test_too_little_memory_for_a_step_is_said_and_smaller_steps_go_on():
    code = """
tokens, blocks = np.arange(1500) % 96, np.arange(64)
backend = small(llama(hidden=512), num_blocks=64, block_size=32, threads=2)
first = run(backend, Sequence(tokens, blocks).next(8))
leave_only(4)
try:
    run(backend, Sequence(tokens, blocks).next(1500))
except OutOfMemoryPlan as error:
    print(error, "|", error.hint)
print(np.array_equal(run(backend, Sequence(tokens, blocks).next(8)), first))
lift()
whole = run(backend, Sequence(tokens, blocks).next(1500))
print(np.array_equal(whole[:8], first))
"""
    said, smaller, whole = in_a_process(code)
    assert "a step of 1500 rows" in said
    assert "smaller batch" in said
    assert (smaller, whole) == ("True", "True")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("granted", [0, 1])
def test_threads_that_cannot_start_are_done_without(tmp_path, wanted, granted):
    source = ROOT / "kernels_cpu/tests/refuse_threads.c"
    shim = tmp_path / "refuse_threads.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    code = f"""
ctypes.CDLL(None).grant_threads({granted})
backend = small(threads=4)
print(backend.threads)
print(digest(logits(backend)))
"""
    assert in_a_process(code, LD_PRELOAD=str(shim)) == [str(granted + 1), wanted]
