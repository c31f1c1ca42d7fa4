"""The layer that predicts one token more (MTP) is found, read right, and changes no answer."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localllm import LLM, SamplingParams
from localllm.checkpoint.opening import open_checkpoint
from localllm.errors import CheckpointError, UnsupportedModel
from localllm.models import load_mtp, load_spec, load_weights
from localllm.models.draft_head import DraftHead
from localllm.spec import DecoderSpec
from tests.engine.test_speculation import eager
from tests.models.running import Golden, golden
from tests.models.tiny import write_checkpoint

CASES = ("qwen3_5-pattern", "qwen3_5_moe-pattern", "qwen3_next-sparse-step", "glm4_moe-one-dense")


def with_mtp(case: Golden, folder: Path, spec: DecoderSpec, without: str = "") -> Path:
    """The golden model, and a copy of its last layer that attends as the layer in question."""
    width, random = spec.hidden, np.random.default_rng(0)
    layer = [index for index, _ in spec.attentions][-1 if "glm" in case.name else 0]
    tensors = case.tensors()
    at, past = f"layers.{layer}.", f"model.layers.{len(spec.layers)}."
    own = {name: data for name, data in tensors.items() if f".{at}" in f".{name}"}
    assert own
    extra = random.normal(size=(width, 2 * width)).astype(np.float32)
    norms = random.normal(size=(3, width)).astype(np.float32)
    if "glm" in case.name:
        copied = {past + name.split(at, 1)[1]: data for name, data in own.items()}
        names = ("eh_proj", "hnorm", "enorm", "shared_head.norm")
        added = {f"{past}{n}.weight": x for n, x in zip(names, [extra, *norms], strict=True)}
    else:
        copied = {"mtp.layers.0." + name.split(at, 1)[1]: data for name, data in own.items()}
        names = ("fc", "pre_fc_norm_hidden", "pre_fc_norm_embedding", "norm")
        added = {f"mtp.{n}.weight": x for n, x in zip(names, [extra, *norms], strict=True)}
    tensors |= copied | added
    if without:
        tensors = {n: x for n, x in tensors.items() if not n.endswith(without)}
    return write_checkpoint(folder, case.config, tensors)


def read(folder: Path) -> tuple[DecoderSpec, DraftHead]:
    checkpoint = open_checkpoint(folder)
    spec = load_spec(checkpoint)
    return spec, load_mtp(checkpoint, spec)


@pytest.mark.parametrize("name", CASES)
def test_it_is_read_as_the_layer_it_is_and_with_its_norms(name: str, tmp_path: Path) -> None:
    case = golden(name)
    plain = open_checkpoint(case.write(tmp_path / "plain"))
    spec = load_spec(plain)
    folder = with_mtp(case, tmp_path / "mtp", spec)
    _, head = read(folder)

    width, random = spec.hidden, np.random.default_rng(0)
    extra = random.normal(size=(width, 2 * width)).astype(np.float32)
    norms = random.normal(size=(3, width)).astype(np.float32)
    assert np.array_equal(head.from_embedding.to_float32(), extra[:, :width])
    assert np.array_equal(head.from_hidden.to_float32(), extra[:, width:])
    offset = 1.0 if "qwen" in name else 0.0
    assert np.allclose(head.hidden_norm, norms[0] + offset)
    assert np.allclose(head.embedding_norm, norms[1] + offset)
    assert np.array_equal(head.weights["final_norm.weight"].to_float32(), norms[2])

    layer = [index for index, _ in spec.attentions][-1 if "glm" in name else 0]
    at = f"layers.{layer}."
    wanted = {n: w for n, w in load_weights(plain, spec) if n.startswith(at)}
    assert wanted
    for full, weight in wanted.items():
        own = head.weights["layers.0." + full.removeprefix(at)]
        assert np.array_equal(own.to_float32(), weight.to_float32()), full


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_drafts_and_changes_no_answer(
    name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)  # random heads are not worth their time
    case = golden(name)
    spec = load_spec(open_checkpoint(case.write(tmp_path / "plain")))
    folder = with_mtp(case, tmp_path / "mtp", spec)
    with LLM(str(folder), backend=backend, threads=1, draft_head="mtp", context=64) as llm:
        params = SamplingParams(max_tokens=56, temperature=0.9, seed=4, speculation="head")
        drafted = llm.generate([1, 5, 9, 2], params)
        plain = llm.generate([1, 5, 9, 2], replace(params, speculation="off"))
    assert drafted.token_ids == plain.token_ids
    assert drafted.receipt.drafted_tokens > 0


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    case = golden("qwen3_5-pattern")
    spec = load_spec(open_checkpoint(case.write(tmp_path / "plain")))
    for missing in ("mtp.pre_fc_norm_hidden.weight", "mtp.layers.0.self_attn.o_proj.weight"):
        folder = with_mtp(case, tmp_path / missing, spec, without=missing)
        with pytest.raises(CheckpointError, match=re.escape(missing)):
            read(folder)
    with pytest.raises(UnsupportedModel, match="no layer that predicts one token more"):
        read(tmp_path / "plain")
    with pytest.raises(UnsupportedModel) as caught:
        read(golden("llama-gqa").write(tmp_path / "llama"))
    assert "--method draft-head" in str(caught.value.hint)
