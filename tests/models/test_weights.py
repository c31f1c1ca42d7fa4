"""Tensors become weights: found under every usual name, checked, read one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from localllm.backend.reference import ReferenceBackend
from localllm.checkpoint.base import Checkpoint
from localllm.checkpoint.opening import open_checkpoint
from localllm.checkpoint.tensor import Tensor
from localllm.errors import CheckpointError, UnsupportedModel
from localllm.models import load_spec, load_weights
from localllm.spec.weights import weight_shapes
from tests.models.running import TOLERANCE, Golden, backend, difference, golden, whole_prompt
from tests.models.tiny import write_checkpoint

Tensors = dict[str, np.ndarray]


def loaded(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return dict(load_weights(checkpoint, load_spec(checkpoint)))


def assert_same_logits(case: Golden, tensors: Tensors, folder: Path) -> None:
    running = backend(write_checkpoint(folder, case.config, tensors), len(case.tokens))
    assert difference(whole_prompt(running, case.tokens), case.whole) < TOLERANCE


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    return {rename(name): data for name, data in tensors.items()}


def test_names_order_and_shapes_are_those_of_the_spec(tmp_path: Path) -> None:
    for name in ("llama-gqa", "gpt2-tied", "mixtral-top2", "gemma3-pattern", "phi3-mha"):
        folder = golden(name).write(tmp_path / name)
        checkpoint = open_checkpoint(folder)
        spec = load_spec(checkpoint)
        weights = [(key, tensor.shape) for key, tensor in load_weights(checkpoint, spec)]
        assert weights == list(weight_shapes(spec).items())


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral-top2", "gpt2-tied", "phi3-mha"])
def test_every_missing_tensor_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    case = golden(name)
    for missing in case.shapes:
        tensors = case.tensors()
        del tensors[missing]
        folder = write_checkpoint(tmp_path / missing, case.config, tensors)
        if missing == "lm_head.weight":
            continue  # without a word in the config the head is then the embedding
        with pytest.raises(CheckpointError, match=re.escape(missing)) as caught:
            loaded(folder)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral-top2", "gpt2-tied", "phi3-mha"])
def test_every_misshapen_tensor_is_named_with_both_shapes(name: str, tmp_path: Path) -> None:
    case = golden(name)
    for wrong, shape in case.shapes.items():
        tensors = case.tensors()
        tensors[wrong] = np.zeros((shape[0] + 1, *shape[1:]), np.float32)
        folder = write_checkpoint(tmp_path / wrong, case.config, tensors)
        with pytest.raises(CheckpointError) as caught:
            loaded(folder)
        for part in (wrong, str(shape), str([shape[0] + 1, *shape[1:]])):
            assert part in str(caught.value)


def test_nothing_is_read_before_all_is_checked(tmp_path: Path) -> None:
    case = golden("llama-gqa")
    tensors = case.tensors()
    del tensors["model.norm.weight"]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, case.config, tensors))
    spec = load_spec(checkpoint)
    with pytest.raises(CheckpointError):
        load_weights(Counting(checkpoint), spec)


def test_a_tensor_is_read_when_its_weight_is_asked_for(tmp_path: Path) -> None:
    counting = Counting(open_checkpoint(golden("phi3-mha").write(tmp_path)))
    weights = load_weights(counting, load_spec(counting))
    assert counting.read == []
    next(weights)
    assert counting.read == ["model.embed_tokens.weight"]
    list(weights)
    assert len(counting.read) == len(set(counting.read)), "fused tensors are read once"


def test_tensors_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    case = golden("llama-gqa")
    tensors = case.tensors()
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    with pytest.raises(UnsupportedModel, match="q_norm"):
        loaded(write_checkpoint(tmp_path, case.config, tensors))


def test_a_layer_more_than_the_config_says_is_refused(tmp_path: Path) -> None:
    case = golden("llama-gqa")
    config = {**case.config, "num_hidden_layers": 1}
    with pytest.raises(UnsupportedModel, match=r"layers\.1\."):
        loaded(write_checkpoint(tmp_path, config, case.tensors()))


def test_buffers_of_older_checkpoints_are_left_out(tmp_path: Path) -> None:
    llama, gpt2 = golden("llama-gqa"), golden("gpt2-tied")
    tensors = llama.tensors()
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert_same_logits(llama, tensors, tmp_path / "llama")
    tensors = gpt2.tensors()
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 48, 48), np.float32)
    tensors["transformer.h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    assert_same_logits(gpt2, tensors, tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("llama-mha-tied", "model."),
        ("gpt2-tied", "transformer."),
        ("qwen3-mqa-tied-window", "model."),
    ],
)
def test_a_base_model_saved_without_prefix_loads(name: str, prefix: str, tmp_path: Path) -> None:
    case = golden(name)
    assert_same_logits(case, renamed(case.tensors(), lambda n: n.removeprefix(prefix)), tmp_path)


def test_gemma3_multimodal_names_of_both_generations_load(tmp_path: Path) -> None:
    case = golden("gemma3-multimodal")
    tensors = case.tensors()
    assert any(name.startswith("language_model.model.") for name in tensors)

    def newer(name: str) -> str:
        return "model." + name.replace("language_model.model.", "language_model.")

    assert_same_logits(case, renamed(tensors, newer), tmp_path)


def test_a_vision_tower_is_left_out_and_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded(golden("gemma3-multimodal").write(tmp_path))
    assert "vision_tower" in caplog.text


def test_layers_that_guess_several_tokens_are_left_out_and_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = golden("qwen3_5-pattern")
    more = {"mtp.fc.weight": np.zeros((32, 64), np.float32)}
    folder = write_checkpoint(tmp_path, case.config, {**case.tensors(), **more})
    checkpoint = open_checkpoint(folder)
    with caplog.at_level("WARNING"):
        load_weights(checkpoint, load_spec(checkpoint))
    assert "mtp.fc.weight" in caplog.text


@pytest.mark.parametrize(
    ("name", "old", "gate", "up", "down"),
    [
        ("mixtral-top2", "block_sparse_moe", "w1", "w3", "w2"),
        ("qwen3_moe-norm-topk", "mlp", "gate_proj", "up_proj", "down_proj"),
    ],
)
def test_experts_load_one_by_one_fused_and_stacked(
    name: str, old: str, gate: str, up: str, down: str, tmp_path: Path
) -> None:
    case = golden(name)
    one_by_one = case.tensors()
    rest = {key: data for key, data in one_by_one.items() if ".experts." not in key}
    fused, stacked = dict(rest), dict(rest)
    for layer in range(case.config["num_hidden_layers"]):
        at = f"model.layers.{layer}.{old}"

        def stack(matrix: str, at: str = at) -> np.ndarray:
            count = sum(key.startswith(f"{at}.experts.") for key in one_by_one) // 3
            return np.stack([one_by_one[f"{at}.experts.{e}.{matrix}.weight"] for e in range(count)])

        into = f"model.layers.{layer}.mlp.experts"
        fused[f"{into}.gate_up_proj"] = np.concatenate([stack(gate), stack(up)], axis=1)
        fused[f"{into}.down_proj"] = stack(down)
        for ours, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            stacked[f"{at}.switch_mlp.{ours}.weight"] = stack(matrix)
    fused = renamed(fused, lambda n: n.replace(f"{old}.gate.weight", "mlp.gate.weight"))
    assert_same_logits(case, one_by_one, tmp_path / "one")
    assert_same_logits(case, fused, tmp_path / "fused")
    assert_same_logits(case, stacked, tmp_path / "stacked")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    case = golden("mixtral-top2")
    tensors = case.tensors()
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3"):
        loaded(write_checkpoint(tmp_path, case.config, tensors))


def test_gpt2_matrices_turned_around_by_mlx_converters_load(tmp_path: Path) -> None:
    case = golden("gpt2-tied")

    def turned(name: str, data: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(data.T) if ".c_" in name and data.ndim == 2 else data

    tensors = {
        name.replace("transformer.", "model."): turned(name, data)
        for name, data in case.tensors().items()
    }
    assert_same_logits(case, tensors, tmp_path)


def test_a_checkpoint_without_head_uses_the_embedding(tmp_path: Path) -> None:
    case = golden("llama-gqa")
    tensors = case.tensors()
    del tensors["lm_head.weight"]
    assert "tie_word_embeddings" not in case.config
    assert load_spec(open_checkpoint(write_checkpoint(tmp_path, case.config, tensors))).tied_head


def test_a_head_that_the_config_promises_must_be_there(tmp_path: Path) -> None:
    case = golden("llama-gqa")
    tensors = case.tensors()
    del tensors["lm_head.weight"]
    folder = write_checkpoint(tmp_path, {**case.config, "tie_word_embeddings": False}, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_spec(open_checkpoint(folder))


def test_a_head_beside_a_tied_config_is_used_if_it_differs(tmp_path: Path) -> None:
    case = golden("llama-mha-tied")
    tensors = case.tensors()
    embed = tensors["model.embed_tokens.weight"]
    copy = write_checkpoint(tmp_path / "copy", case.config, {**tensors, "lm_head.weight": embed})
    assert load_spec(open_checkpoint(copy)).tied_head
    assert "head.weight" not in loaded(copy)
    own = write_checkpoint(tmp_path / "own", case.config, {**tensors, "lm_head.weight": embed + 1})
    assert not load_spec(open_checkpoint(own)).tied_head
    assert np.array_equal(loaded(own)["head.weight"].to_float32(), embed + 1)


def test_half_precision_stays_as_stored(tmp_path: Path) -> None:
    case = golden("mixtral-top2")
    tensors = {name: data.astype(np.float16) for name, data in case.tensors().items()}
    weights = loaded(write_checkpoint(tmp_path, case.config, tensors))
    assert {tensor.to_float32().dtype for tensor in weights.values()} == {np.dtype(np.float32)}
    assert {getattr(tensor, "dtype", None) for tensor in weights.values()} == {"float16"}


@pytest.mark.parametrize("name", ["phi3-mha", "llama-gqa"])
def test_mlx_quantized_matrices_are_taken_apart_without_loss(name: str, tmp_path: Path) -> None:
    case = golden(name)
    packed: Tensors = {}
    dense: Tensors = {}
    for key, data in case.tensors().items():
        packed[key] = dense[key] = data
        if data.ndim == 2 and data.shape[1] % 32 == 0:
            parts = mx.quantize(mx.array(data), group_size=32, bits=4)
            stem = key.removesuffix("weight")
            ends = ("weight", "scales", "biases")
            packed |= {stem + end: np.array(x) for end, x in zip(ends, parts, strict=True)}
            dense[key] = np.array(mx.dequantize(*parts, group_size=32, bits=4))
    config = {**case.config, "quantization": {"group_size": 32, "bits": 4}}
    quantized = backend(write_checkpoint(tmp_path / "q", config, packed), len(case.tokens))
    plain = backend(write_checkpoint(tmp_path / "d", case.config, dense), len(case.tokens))
    ours, theirs = (whole_prompt(running, case.tokens) for running in (quantized, plain))
    assert difference(ours, theirs) < TOLERANCE
    assert difference(ours, case.whole) > TOLERANCE, "nothing was quantized"


def test_the_weights_fill_a_backend(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(golden("qwen2-gqa").write(tmp_path))
    spec = load_spec(checkpoint)
    ReferenceBackend(spec, load_weights(checkpoint, spec), num_blocks=1).close()


class Counting:
    """A checkpoint that remembers which tensors were read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path, self.format, self.config = checkpoint.path, checkpoint.format, checkpoint.config
        self.read: list[str] = []

    def files(self) -> tuple[Path, ...]:
        return self._checkpoint.files()

    def names(self) -> Iterator[str]:
        return self._checkpoint.names()

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def kind(self, name: str) -> str:
        return self._checkpoint.kind(name)

    def nbytes(self, name: str) -> int:
        return self._checkpoint.nbytes(name)

    def tensor(self, name: str) -> Tensor:
        self.read.append(name)
        return self._checkpoint.tensor(name)

    def close(self) -> None:
        self._checkpoint.close()
