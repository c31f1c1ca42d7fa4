"""Writes tests/tokenizer/golden: ids of hard texts as independent tokenizers give them.

    python scripts/goldens/tokenizer_ids.py

llama.cpp answers through node-llama-cpp, transformers by converting the file's vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from localllm.checkpoint import open_checkpoint  # noqa: E402
from localllm.hub import resolve  # noqa: E402
from localllm.tokenizer.pretokenizers import KINDS  # noqa: E402
from scripts.parity.peers import node_llama_cpp  # noqa: E402
from tests.tokenizer.texts import HARD, random_texts  # noqa: E402

GOLDEN = ROOT / "tests/tokenizer/golden"
RANDOM = 200
# transformers does not read the file's pre-tokenizer kind, so its SmolLM2 is not the original.
BY_TRANSFORMERS = ("gemma3",)
# Texts on which pre-tokenizers differ most; the whole list would make a large file.
KIND_TEXTS = ("contractions", "digits", "other digits", "spaces", "newlines", "python", "cjk")
KIND_TEXTS += ("rtl", "combining", "symbols", "mixed case", "scripts")
# What llama.cpp wants to see in a header.
LLAMA: dict[str, int | float] = {"block_count": 1, "context_length": 64, "embedding_length": 64}
LLAMA |= {"feed_forward_length": 64, "attention.head_count": 1, "rope.dimension_count": 64}
LLAMA |= {"attention.layer_norm_rms_epsilon": 1e-5}
MODELS = {"smollm2": "smollm2:135m", "gemma3": "gemma3:270m"}


def llamacpp_ids(model: Path, texts: list[str]) -> list[dict[str, list[int]]]:
    """Ids by llama.cpp: "plain" takes control tokens as text, "special" does not."""
    folder, advice = node_llama_cpp()
    if folder is None:
        raise SystemExit(f"node-llama-cpp is not installed: {advice}")
    done = subprocess.run(
        ["node", str(Path(__file__).with_suffix(".mjs")), str(model)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        cwd=folder,
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed on {model}: {done.stderr.strip()[-2000:]}")
    answer: list[dict[str, list[int]]] = json.loads(done.stdout)
    return answer


def kind_ids(vocabulary: Mapping[str, Any], kind: str, texts: list[str]) -> list[list[int]]:
    """Ids by llama.cpp for a byte-level vocabulary that names another pre-tokenizer kind."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kind.gguf"
        writer = GGUFWriter(path, "llama")
        for key, value in LLAMA.items():
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"llama.{key}", value)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_list(vocabulary["tokenizer.ggml.tokens"])
        writer.add_token_types(vocabulary["tokenizer.ggml.token_type"])
        writer.add_token_merges(vocabulary["tokenizer.ggml.merges"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return [ids["plain"] for ids in llamacpp_ids(path, texts)]


def transformers_ids(model: Path, texts: list[str]) -> list[list[int]]:
    """Ids by transformers' own conversion of the file's vocabulary; control tokens parsed."""
    from transformers import AutoTokenizer

    warnings.simplefilter("ignore")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name)
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def main() -> None:
    names = [*HARD, *(f"random {i}" for i in range(RANDOM))]
    texts = [*HARD.values(), *random_texts(RANDOM)]
    GOLDEN.mkdir(exist_ok=True)
    for name, model in MODELS.items():
        path = resolve(model).path
        rows = [
            {"name": label, "text": text, **ids}
            for label, text, ids in zip(names, texts, llamacpp_ids(path, texts), strict=True)
        ]
        if name in BY_TRANSFORMERS:
            for row, ids in zip(rows, transformers_ids(path, texts), strict=True):
                row["transformers"] = ids
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        (GOLDEN / f"{name}.json").write_text(f"[\n{lines}\n]\n", "utf-8")
        print(f"wrote {len(rows)} texts for {name}")
    vocabulary = open_checkpoint(resolve(MODELS["smollm2"]).path).config
    chosen = [HARD[name] for name in KIND_TEXTS]
    kinds = {kind: kind_ids(vocabulary, kind, chosen) for kind in KINDS}
    lines = ",\n".join(
        f"{json.dumps(k)}:{json.dumps(v)}".replace(" ", "") for k, v in kinds.items()
    )
    (GOLDEN / "kinds.json").write_text(f"{{\n{lines}\n}}\n", "utf-8")
    print(f"wrote {len(kinds)} pre-tokenizer kinds")


if __name__ == "__main__":
    main()
