"""`localllm plan`: a sum that can be checked, and ways out that hold when they are taken."""

from __future__ import annotations

import json
import re

import pytest
import typer

from localllm.cli.sizes import parse_bytes, parse_count


def facts(done) -> dict:
    return json.loads(done.stdout)


def test_it_lists_the_parts_and_their_total(localllm, tiny):
    done = localllm("plan", tiny, "--context", "4k", "--batch", 8, "--memory", "4GB")
    assert done.returncode == 0, done.stderr
    names = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert names[:4] == ["weights", "step", "KV cache", "Python"]
    assert "context 4k, batch 8" in done.stdout
    assert "It fits, with" in done.stdout
    told = facts(localllm("plan", tiny, "--context", "4k", "--memory", "4GB", "--json"))
    assert told["total_bytes"] == sum(item["bytes"] for item in told["items"])
    assert told["context"] == 4096
    assert told["available_bytes"] == 4_000_000_000


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_does_not_fit_ends_with_1_and_with_ways_out_that_do_fit(localllm, tiny, backend):
    wish = ["plan", tiny, "--backend", backend, "--context", "96k"]
    told = facts(localllm(*wish, "--json"))
    tight = told["total_bytes"] - 4_000_000
    done = localllm(*wish, "--memory", tight, "--json")
    assert done.returncode == 1
    ways = [way["change"] for way in facts(done)["ways_out"]]
    assert any(way.startswith("--context") for way in ways)
    assert ("--kv-bits 8" in ways) == (backend == "cpu")
    for way in ways[:2]:
        if not way.startswith("--"):
            continue
        taken = facts(localllm(*wish, *way.split(), "--memory", told["total_bytes"] * 2, "--json"))
        # The process's own size differs from start to start, and grows a little while it plans.
        needed = taken["total_bytes"] - own_size(taken) + own_size(facts(done))
        assert needed <= tight + 1_000_000, way
    text = localllm(*wish, "--memory", tight)
    assert text.returncode == 1
    assert "It does not fit" in text.stdout
    [told_here] = re.findall(r"--context (\d+)k", text.stdout)
    [told_before] = re.findall(r"--context (\d+)k", " ".join(ways))
    assert abs(int(told_here) - int(told_before)) <= 2  # of some 80: a megabyte more or less


def own_size(plan: dict) -> int:
    return next(item["bytes"] for item in plan["items"] if item["name"] == "Python")


def test_adapters_and_a_draft_model_have_their_lines(localllm, tiny):
    adapters = ("--adapters", 3, "--adapter-rank", 8)
    told = facts(localllm("plan", tiny, *adapters, "--draft-model", tiny, "--json"))
    sizes = {item["name"]: item["bytes"] for item in told["items"]}
    assert sizes["draft model"] == sizes["weights"]
    assert sizes["KV cache of the draft"] == sizes["KV cache"]
    assert sizes["adapters"] > 0


def test_kv_bits_are_refused_by_the_name_of_the_backend_that_lacks_them(localllm, tiny):
    for command in (["plan", tiny], ["run", tiny, "hi"]):
        done = localllm(*command, "--backend", "reference", "--kv-bits", 8)
        assert done.returncode == 1
        assert "the reference backend keeps a KV cache of 32 bits, not 8" in done.stderr


def test_a_model_runs_with_the_kv_bits_asked_for(localllm, tiny):
    done = localllm("run", tiny, "hi", "--backend", "cpu", "--kv-bits", 4, "--max-tokens", 4)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "value"), [("8192", 8192), ("32k", 32768), ("1.5K", 1536), ("1m", 1 << 20)]
)
def test_counts_are_in_powers_of_1024(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1000", 1000),
        ("500MB", 500_000_000),
        ("16GB", 16_000_000_000),
        ("16 gb", 16_000_000_000),
        ("16G", 16_000_000_000),
        ("1.5GiB", 3 << 29),
        ("2TiB", 2 << 40),
        ("7b", 7),
    ],
)
def test_bytes_are_in_powers_of_1000_or_of_1024(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "k", "-1", "0", "8kk", "lots", "1e9", "9" * 40, "0.1"])
def test_what_is_no_size_is_bad_usage(text):
    for parse in (parse_count, parse_bytes):
        with pytest.raises(typer.BadParameter):
            parse(text)
