"""What is saved is what is loaded, to the bit, under the names that transformers' models have."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.adapters import load_adapter
from localllm.adapters.writing import CONFIG, save_adapter
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.safetensors import SafetensorsFile
from localllm.errors import CheckpointError, InvalidRequest, UnsupportedModel
from localllm.models import load_spec
from localllm.spec import DecoderSpec
from localllm.train.program import Layout
from tests.adapters.layouts import Settings, layout, linears, parameters
from tests.adapters.saved import CASES, FOLDER
from tests.adapters.test_parity import logits, opened
from tests.examples import examples
from tests.models.running import TOLERANCE, difference, golden, golden_names

ONE_EACH = sorted({name.split("-")[0]: name for name in golden_names()}.values())


def spec_of(name: str, folder: Path) -> DecoderSpec:
    checkpoint = open_checkpoint(golden(name).write(folder))
    try:
        return load_spec(checkpoint)
    finally:
        checkpoint.close()


def save(folder: Path, spec: DecoderSpec, made: Layout, values: np.ndarray, config: Settings):
    return save_adapter(folder, made, values, config=config, base_model="org/base", spec=spec)


def hold_round_trip(folder: Path, spec: DecoderSpec, made: Layout, values: np.ndarray) -> None:
    targets = load_adapter(folder, spec).targets
    assert set(targets) == set(made.targets)
    views = made.views(values)
    for target, pair in targets.items():
        assert pair.scale == made.scales[target]
        assert np.array_equal(pair.a.data, views[f"{target}.a"])
        assert np.array_equal(pair.b.data, views[f"{target}.b"])


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_architecture_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, tmp_path / "model")
    made = layout(spec, Settings())
    values = parameters(made)
    hold_round_trip(save(tmp_path / "adapter", spec, made, values, Settings()), spec, made, values)


@settings(max_examples=examples(40), deadline=None)
@given(data=st.data())
def test_any_targets_ranks_and_scales_come_back(data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("any")
    name = data.draw(st.sampled_from(["llama-gqa", "gemma3-pattern", "qwen3_moe-sparse-step"]))
    spec = spec_of(name, folder / "model")
    config = Settings(
        alpha=data.draw(st.floats(0.01, 1000)), rslora=data.draw(st.booleans()), dropout=0.1
    )
    chosen = data.draw(st.lists(st.sampled_from(linears(spec)), min_size=1, unique=True))

    def module(target: str) -> str:  # what is of one parameter has one scale there
        return target.replace("moe.up", "moe.gate")

    ranks = {module(target): data.draw(st.integers(1, 9)) for target in chosen}
    made = layout(spec, config, targets=chosen, rank=lambda target: ranks[module(target)])
    values = parameters(made, data.draw(st.integers(0, 99)))
    hold_round_trip(save(folder / "adapter", spec, made, values, config), spec, made, values)


@pytest.mark.parametrize("targets", [["attn.q", "attn.v"], ["attn.k"], ["ffn.up", "attn.q"]])
def test_parts_of_a_fused_module_come_back(targets: list[str], tmp_path: Path) -> None:
    spec = spec_of("phi3-mha", tmp_path / "model")
    ranks = {target: 2 + i for i, target in enumerate(targets)}
    chosen = [f"layers.{n}.{target}" for n in range(len(spec.layers)) for target in targets]
    made = layout(spec, Settings(alpha=4.0), targets=chosen)
    values = parameters(made)
    folder = save(tmp_path / "adapter", spec, made, values, Settings(alpha=4.0))
    hold_round_trip(folder, spec, made, values)
    uneven = layout(
        spec, Settings(), targets=chosen, rank=lambda target: ranks[target.split(".", 2)[2]]
    )
    values = parameters(uneven)
    folder = save(tmp_path / "uneven", spec, uneven, values, Settings())
    views = uneven.views(values)
    for target, pair in load_adapter(folder, spec).targets.items():  # one scale for the module
        own = views[f"{target}.b"] @ views[f"{target}.a"] * np.float32(uneven.scales[target])
        assert np.allclose(pair.delta(), own, rtol=1e-5, atol=1e-7)


def test_the_config_is_what_peft_reads(tmp_path: Path) -> None:
    spec = spec_of("llama-gqa", tmp_path / "model")
    chosen = [name for name in linears(spec) if name.endswith(("attn.q", "attn.v"))]
    made = layout(spec, Settings(), targets=[*chosen, "layers.1.ffn.up"], rank=lambda target: 8)
    folder = save(tmp_path / "adapter", spec, made, parameters(made), Settings(dropout=0.05))
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == ["q_proj", "model.layers.1.mlp.up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert config["base_model_name_or_path"] == "org/base"
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    file = SafetensorsFile(folder / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight" in file.tensors
    file.close()


def test_a_mixture_names_its_modules_in_full_since_experts_share_their_last_words(
    tmp_path: Path,
) -> None:
    spec = spec_of("qwen3_moe-sparse-step", tmp_path / "model")
    made = layout(spec, Settings())
    folder = save(tmp_path / "adapter", spec, made, parameters(made), Settings())
    named = json.loads((folder / CONFIG).read_text())["target_modules"]
    assert all(name.startswith("model.layers.") for name in named)


def test_what_is_no_adapter_or_not_finite_is_refused(tmp_path: Path) -> None:
    spec = spec_of("llama-gqa", tmp_path / "model")
    whole = Layout({"final_norm.weight": (spec.hidden,)}, {})
    with pytest.raises(InvalidRequest, match="not an adapter"):
        save(tmp_path / "a", spec, whole, np.ones(spec.hidden, np.float32), Settings())
    made = layout(spec, Settings())
    values = parameters(made)
    values[5] = np.nan
    with pytest.raises(InvalidRequest, match="NaN"):
        save(tmp_path / "a", spec, made, values, Settings())
    foreign = Layout(
        {"layers.9.attn.q.a": (1, 2), "layers.9.attn.q.b": (2, 1)}, {"layers.9.attn.q": 1.0}
    )
    with pytest.raises(UnsupportedModel, match=r"layers\.9"):
        save(tmp_path / "a", spec, foreign, np.ones(4, np.float32), Settings())
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_kill_while_saving_leaves_the_old_the_new_or_none(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never matrices beside the config of others, whose alpha would make nonsense of them."""
    spec = spec_of("llama-gqa", tmp_path / "model")
    folder = tmp_path / "adapter"
    old, new = layout(spec, Settings()), layout(spec, Settings(alpha=64.0))
    save(folder, spec, old, parameters(old), Settings())
    before = load_adapter(folder, spec).digest
    calls, real = 0, os.replace

    def replace(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise KeyboardInterrupt
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", replace)
    killed = False
    try:
        save(folder, spec, new, parameters(new, 4), Settings(alpha=64.0))
    except KeyboardInterrupt:
        killed = True
    monkeypatch.setattr(os, "replace", real)
    assert killed == (fails_at < 3)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    if killed:
        with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
            load_adapter(folder, spec)
    else:
        assert load_adapter(folder, spec).digest != before


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_saved_adapters_compute_here_what_peft_computes_from_them(
    name: str, backend: str, tmp_path: Path
) -> None:
    case = CASES[name]
    model = case.base.write(tmp_path / "model")
    running, adapter = opened(model, backend, case.save(model, tmp_path / "adapter"))
    found = logits(running, case.base.tokens, running.add_adapter(adapter))
    with np.load(FOLDER / f"{name}.npz") as arrays:
        assert difference(found, arrays["logits"]) < TOLERANCE
        assert difference(arrays["logits"], case.base.whole) > 0.05, "it must matter here"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_peft_loads_them(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from scripts.goldens.saved_adapters import peft_logits

    with np.load(FOLDER / f"{name}.npz") as arrays:
        assert difference(peft_logits(CASES[name], tmp_path), arrays["logits"]) < TOLERANCE
