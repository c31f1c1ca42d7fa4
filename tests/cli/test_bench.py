"""`localllm bench`: a table on stdout, the rest on stderr, mistakes explained."""

from __future__ import annotations

import json

import pytest

QUICK = ("--contexts", "16,64", "--batches", "1,3", "--prefill", 32, "--rounds", 2)


def test_it_prints_a_table_with_what_runs_and_where(localllm, smollm2):
    done = localllm("bench", smollm2, *QUICK, "--threads", 1)
    assert done.returncode == 0, done.stderr
    for words in (
        "on cpu, ",
        " kernels, 1 thread, int8 activations",
        "localllm 0.",
        "GB/s",
        "resident once loaded",
        "prefill of 32",
        "decode at 16",
        "% of the bandwidth",
        "3 at once",
        "x a decode step",
    ):
        assert words in done.stdout
    assert "for about 60 s at most" in done.stderr


def test_json_is_one_object(localllm, tiny):
    done = localllm("bench", tiny, *QUICK, "--activations", "float32", "--json")
    report = json.loads(done.stdout)
    assert report["activations"] == "float32"
    works = [row["work"] for row in report["rows"]]
    assert works == ["prefill", "decode", "verify", "decode", "batch", "batch"]
    assert all(row["tokens_per_second"] > 0 for row in report["rows"])


def test_the_reference_backend_says_what_it_leaves_out(localllm, tiny):
    done = localllm("bench", tiny, *QUICK, "--backend", "reference")
    assert done.returncode == 0, done.stderr
    assert "left out: share of the read bandwidth" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--contexts", "0"), 2, ["--contexts", "1024"]),
        (("--contexts", "a,b"), 2, ["--contexts", "a,b"]),
        (("--batches", ""), 2, ["--batches"]),
        (("--contexts", "200000"), 1, ["200000", "100000"]),
        (("--backend", "reference", "--activations", "int8"), 1, ["reference", "float32"]),
    ],
)
def test_mistakes_are_explained_without_a_traceback(localllm, tiny, arguments, code, words):
    done = localllm("bench", tiny, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
