"""`hf:` models, against a hub on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localllm.errors import DownloadError, ModelNotFound, StoreError, UnsupportedModel
from localllm.hub import installed, pull, resolve
from tests.hub.conftest import Recorder
from tests.hub.hub_server import COMMIT, OTHER_COMMIT, HubServer, Repository
from tests.hub.wheels import gguf, sha256

MEGA = 1 << 20
FOLDER = {
    "README.md": b"# hello",
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": gguf(5000),
    "pytorch_model.bin": b"pickle",
    "modeling_x.py": b"code",
    "onnx/model.onnx": b"onnx",
}


def kept(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"localllm.json"}


def test_a_folder_is_fetched_without_pickles_and_code(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository(FOLDER, licence="mit")
    model = resolve("hf:o/r")
    assert kept(model.path) == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "model.safetensors"),
    }
    assert (model.path / "model.safetensors").read_bytes() == gguf(5000)
    assert model.manifest is not None
    assert model.manifest.revision == COMMIT
    assert model.manifest.licence == "mit"
    assert {f.name: f.sha256 for f in model.manifest.files}["model.safetensors"] == sha256(
        gguf(5000)
    )


def test_nothing_is_kept_in_the_hubs_own_cache(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hf-cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    hub.repositories["o/r"] = Repository(FOLDER)
    resolve("hf:o/r")
    assert not cache.exists()


def test_the_second_time_no_request_is_made(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository(FOLDER)
    first = resolve("hf:o/r")
    hub.requests.clear()
    assert resolve("hf:o/r@main").path == first.path
    assert hub.requests == []


def sharded() -> dict[str, bytes]:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}).encode()
    return {
        "config.json": b"{}",
        "model.safetensors.index.json": index,
        names[0]: gguf(1000),
        names[1]: gguf(2000),
        "consolidated.safetensors": gguf(3000),
        "model.fp16.safetensors": gguf(1500),
    }


def test_of_a_sharded_checkpoint_what_the_index_lists_is_fetched(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository(sharded())
    assert kept(resolve("hf:o/r").path) == {
        *("config.json", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }


@pytest.mark.parametrize("shard", ["../x.safetensors", "gone.safetensors", "config.json", 3])
def test_an_index_that_names_something_else_is_refused(hub: HubServer, shard: object) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    hub.repositories["o/r"] = Repository({**sharded(), "model.safetensors.index.json": index})
    with pytest.raises(DownloadError, match=r"model\.safetensors\.index\.json"):
        resolve("hf:o/r")


@pytest.mark.parametrize("index", [b"", b"[1]", b"{}", b'{"weight_map": []}', b"\xff"])
def test_a_damaged_index_is_told(hub: HubServer, index: bytes) -> None:
    hub.repositories["o/r"] = Repository({**sharded(), "model.safetensors.index.json": index})
    with pytest.raises(DownloadError, match="index"):
        resolve("hf:o/r")


def test_a_hub_that_lists_names_only_is_asked_for_the_rest(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository(FOLDER, metadata=False)
    assert (resolve("hf:o/r").path / "model.safetensors").read_bytes() == gguf(5000)


GGUFS = {
    "README.md": b"",
    "m-Q8_0.gguf": gguf(800, 8),
    "m-Q4_K_M.gguf": gguf(400, 4),
    "m-IQ2_XS.gguf": gguf(200, 2),
    "mmproj-m-F16.gguf": gguf(100),
    "big/m-F32-00001-of-00002.gguf": gguf(300),
    "big/m-F32-00002-of-00002.gguf": gguf(300),
    "sub/m-Q6_K.gguf": gguf(600, 6),
}


def test_of_several_quantizations_the_preferred_one_is_taken_and_said(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository(GGUFS)
    progress = Recorder()
    model = resolve("hf:o/r", progress=progress)
    assert model.path.name == "m-Q4_K_M.gguf"
    assert model.path.read_bytes() == GGUFS["m-Q4_K_M.gguf"]
    [said] = [line for line in progress.said if "Q4_K_M" in line]
    assert "Q8_0" in said


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        ("m-Q8_0.gguf", "m-Q8_0.gguf"),
        ("Q8_0", "m-Q8_0.gguf"),
        ("q8_0", "m-Q8_0.gguf"),
        ("sub/m-Q6_K.gguf", "sub/m-Q6_K.gguf"),
        ("Q6_K", "sub/m-Q6_K.gguf"),
    ],
)
def test_the_file_that_is_asked_for_is_taken(hub: HubServer, wanted: str, file: str) -> None:
    hub.repositories["o/r"] = Repository({**FOLDER, **GGUFS})
    assert resolve(f"hf:o/r:{wanted}").path.read_bytes() == GGUFS[file]


def test_a_file_that_is_not_there_is_met_with_those_that_are(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository(GGUFS)
    with pytest.raises(ModelNotFound, match="Q5_K_M") as caught:
        resolve("hf:o/r:Q5_K_M")
    assert "m-Q8_0.gguf" in (caught.value.hint or "")


def test_a_split_gguf_is_refused_with_a_way_out(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository({k: v for k, v in GGUFS.items() if "-of-" in k})
    for name in ("hf:o/r", "hf:o/r:F32"):
        with pytest.raises(UnsupportedModel, match="split GGUF") as caught:
            resolve(name)
        assert "merge" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "pickle"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "adapter"),
        ({"README.md": b""}, "holds no model"),
        ({"m-IQ2_XS.gguf": gguf()}, "IQ quantizations"),
    ],
)
def test_a_repository_we_cannot_use_is_told_why(
    hub: HubServer, home: Path, files: dict[str, bytes], reason: str
) -> None:
    hub.repositories["o/r"] = Repository(files)
    with pytest.raises((ModelNotFound, UnsupportedModel), match=reason):
        resolve("hf:o/r")
    assert list((home / "partial").iterdir()) == []


def test_a_lost_connection_goes_on_where_it_broke_off(hub: HubServer) -> None:
    weights = gguf(30 * MEGA)
    hub.repositories["o/r"] = Repository({"m.gguf": weights})
    hub.behaviour.drop_after["m.gguf"] = [25 * MEGA]
    progress = Recorder()
    assert resolve("hf:o/r", progress=progress).path.read_bytes() == weights
    ranges = [request.range for request in hub.content_requests("m.gguf")]
    assert ranges[0] is None
    assert len(ranges) == 2
    assert int((ranges[1] or "").removeprefix("bytes=").rstrip("-")) >= 10 * MEGA
    assert any("connection lost" in line for line in progress.said)


def test_a_pull_that_failed_is_resumed_by_the_next(
    hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    weights = gguf(30 * MEGA)
    hub.repositories["o/r"] = Repository({"m.gguf": weights})
    hub.behaviour.drop_after["m.gguf"] = [25 * MEGA, *[0] * 60]
    with pytest.raises(DownloadError, match="broke off at") as caught:
        resolve("hf:o/r")
    assert "again" in (caught.value.hint or "")
    assert installed() == []
    hub.behaviour.drop_after.clear()
    hub.requests.clear()
    assert resolve("hf:o/r").path.read_bytes() == weights
    [again] = hub.content_requests("m.gguf")
    assert int((again.range or "").removeprefix("bytes=").rstrip("-")) >= 10 * MEGA
    assert list((home / "partial").iterdir()) == []


def test_a_hub_that_ignores_ranges_still_gives_the_right_content(hub: HubServer) -> None:
    weights = gguf(30 * MEGA)
    hub.repositories["o/r"] = Repository({"m.gguf": weights})
    hub.behaviour.drop_after["m.gguf"] = [25 * MEGA]
    hub.behaviour.ignores_range = True
    assert resolve("hf:o/r").path.read_bytes() == weights


def test_what_an_older_commit_left_half_done_is_not_mixed_in(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.repositories["o/r"] = Repository({**FOLDER, "tokenizer.json": b"{ }"})
    hub.behaviour.drop_after["model.safetensors"] = [0] * 60
    with pytest.raises(DownloadError):
        resolve("hf:o/r")
    hub.behaviour.drop_after.clear()
    hub.repositories["o/r"] = Repository(FOLDER, commit=OTHER_COMMIT)
    model = resolve("hf:o/r")
    assert model.manifest is not None
    assert model.manifest.revision == OTHER_COMMIT
    assert (model.path / "tokenizer.json").read_bytes() == b"{}"


@pytest.mark.parametrize("metadata", [True, False])
def test_content_that_is_not_what_its_hash_says_is_refused(hub: HubServer, metadata: bool) -> None:
    hub.repositories["o/r"] = Repository({"m.gguf": gguf(5000)}, metadata=metadata)
    hub.behaviour.damaged.add("m.gguf")
    with pytest.raises(DownloadError, match=r"m\.gguf arrived damaged"):
        resolve("hf:o/r")
    assert installed() == []
    hub.behaviour.damaged.clear()
    assert resolve("hf:o/r").path.read_bytes() == gguf(5000)


def test_a_repository_that_does_not_exist_is_told(hub: HubServer) -> None:
    with pytest.raises(ModelNotFound, match="no repository o/nothing"):
        resolve("hf:o/nothing")


def test_a_revision_that_does_not_exist_is_told(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository(FOLDER)
    with pytest.raises(ModelNotFound, match="no revision 'v9'"):
        resolve("hf:o/r@v9")


def test_a_gated_repository_says_how_to_get_in(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["o/r"] = Repository(FOLDER, gated=True)
    with pytest.raises(DownloadError, match="gated") as caught:
        resolve("hf:o/r")
    assert "HF_TOKEN" in (caught.value.hint or "")
    assert f"{hub.url}/o/r" in (caught.value.hint or "")
    monkeypatch.setenv("HF_TOKEN", "good")
    assert (resolve("hf:o/r").path / "config.json").exists()


def test_the_token_is_never_sent_to_the_content_server(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.repositories["o/r"] = Repository({"m.gguf": gguf()}, gated=True)
    resolve("hf:o/r")
    assert {r.token for r in hub.requests if "/resolve/" in r.path} == {"Bearer good"}
    assert {r.token for r in hub.content_requests("m.gguf")} == {None}


def test_a_hub_out_of_reach_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9 cannot be reached") as caught:
        resolve("hf:o/r")
    assert "HF_ENDPOINT" in (caught.value.hint or "")


def test_the_endpoint_is_read_at_every_call(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["o/r"] = Repository(FOLDER)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError):
        resolve("hf:o/r")
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    assert resolve("hf:o/r").path.exists()


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "LOCALLLM_OFFLINE"])
def test_offline_nothing_is_asked_and_what_is_here_is_used(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    hub.repositories["o/here"] = Repository(FOLDER)
    here = resolve("hf:o/here")
    hub.requests.clear()
    monkeypatch.setenv(variable, "1")
    assert resolve("hf:o/here").path == here.path
    with pytest.raises(DownloadError, match=variable):
        resolve("hf:o/other")
    assert hub.requests == []


def test_offline_can_be_asked_for_by_the_caller(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository(FOLDER)
    with pytest.raises(DownloadError, match="offline"):
        resolve("hf:o/r", offline=True)
    assert hub.requests == []


def test_too_little_space_is_told_before_the_weights_are_asked_for(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["o/r"] = Repository({"m.gguf": gguf(5000)})
    monkeypatch.setattr(
        "localllm.hub.disk.shutil.disk_usage", lambda path: type("U", (), {"free": 4000})
    )
    with pytest.raises(StoreError, match=r"5\.0 kB needed, 4\.0 kB free"):
        resolve("hf:o/r")
    assert hub.content_requests("m.gguf") == []


def test_forcing_fetches_what_has_moved_since(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository({"m.gguf": gguf(500, 1)})
    assert resolve("hf:o/r").path.read_bytes() == gguf(500, 1)
    hub.repositories["o/r"] = Repository({"m.gguf": gguf(500, 2)}, commit=OTHER_COMMIT)
    assert pull("hf:o/r").path.read_bytes() == gguf(500, 1)
    assert pull("hf:o/r", force=True).path.read_bytes() == gguf(500, 2)
