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
