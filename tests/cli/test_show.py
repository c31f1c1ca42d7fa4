"""`localllm show`: what a model is, and whether its weights are packed."""

from __future__ import annotations

import json


def test_it_says_whether_a_start_will_be_quick(localllm, tiny):
    assert "not yet" in localllm("show", tiny).stdout
    localllm("run", tiny, "hi", "--max-tokens", 1, LOCALLLM_NO_PACKED_CACHE="")
    (line,) = (x for x in localllm("show", tiny).stdout.splitlines() if x.startswith("packed"))
    assert "kB on disk, for quick starts" in line


def test_the_memory_it_states_holds_weights_kv_and_a_step(localllm, tiny):
    facts = json.loads(localllm("show", tiny, "--json").stdout)
    kv = facts["planned_context"] * facts["kv_bytes_per_token"]
    assert facts["memory_bytes"] > facts["weight_bytes"] + kv + (30 << 20)


def test_a_known_model_that_is_not_here_is_told_for_machines_of_common_sizes(localllm):
    told = localllm("show", "gpt-oss:20b", LOCALLLM_OFFLINE="1")
    assert told.returncode == 0
    assert "random weights only" in told.stdout
    rows = [line for line in told.stdout.splitlines() if line.startswith("on ")]
    assert [row.split()[1] for row in rows] == ["16", "24", "32", "64"]
    facts = json.loads(localllm("show", "gpt-oss:20b", "--json").stdout)
    assert facts["weights"]["4"] < 0.3 * facts["weights"]["16"]
    contexts = [fit["context"] for fit in facts["fits"] if fit["bits"] == 4]
    assert contexts == sorted(contexts)
    fits = {fit["gigabytes"]: fit for fit in facts["fits"]}
    assert (fits[16]["bits"], fits[64]["bits"]) == (4, 16)  # 11.8 GB and 41.8 GB
    assert localllm("show", "mistral:7b").returncode == 1
