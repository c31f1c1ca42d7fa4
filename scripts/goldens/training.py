"""Writes tests/train/golden.json: losses and gradients by torch, transformers and PEFT.

The models are those of tests/models/golden. A gradient is kept as one number a tensor, its product
with a random direction, so that a wrong entry anywhere shows.

    python -m scripts.goldens.training
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # instead of this folder, whose modules hide libraries by their names
    sys.path[0] = str(ROOT)

from scripts.goldens.models import _load  # noqa: E402
from tests.models.running import golden, golden_names  # noqa: E402
from tests.models.tiny import write_checkpoint  # noqa: E402
from tests.train.cases import (  # noqa: E402
    ADAPTERS,
    GOLDEN,
    PREFERENCES,
    adapter_values,
    along,
    directions,
    kinds_of,
    pairs_of,
    ragged,
)


def write_full(name: str, folder: Path) -> dict[str, Any]:
    """Of all weights of a model, for a ragged batch whose sequences are computed one by one."""
    case = golden(name)
    model = _load(case.config, case.write(folder))
    loss = weighted_loss(model, case)
    loss.backward()
    found = {}
    for kind, names in kinds_of(case.shapes).items():
        # Read as a model, so that whatever transformers does to names and shapes is done to it.
        write_checkpoint(folder / "along", case.config, along(case.shapes, names))
        other = dict(_load(case.config, folder / "along").named_parameters())
        found[kind] = sum(
            (parameter.grad.double() * other[name].double()).sum().item()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        )
    return {"loss": loss.item(), "gradients": found}


def write_adapter(name: str, folder: Path) -> dict[str, Any]:
    """Of an adapter's parameters: supervised, DPO and ORPO."""
    from peft import LoraConfig, get_peft_model

    case = golden(ADAPTERS[name].model)
    settings = ADAPTERS[name].peft
    model = get_peft_model(
        _load(case.config, case.write(folder)), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    trained = {
        key.replace(".default", ""): parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    fill(trained)
    found: dict[str, Any] = {}
    for kind in ("sft", *PREFERENCES):
        model.zero_grad()
        loss = weighted_loss(model, case) if kind == "sft" else preference_loss(kind, model, case)
        loss.backward()
        shapes = {key: list(parameter.shape) for key, parameter in trained.items()}
        found[kind] = {"loss": loss.item(), "gradients": products(trained.items(), shapes)}
    return found


def fill(trained: dict[str, Any]) -> None:
    import torch

    for key, value in adapter_values({k: tuple(p.shape) for k, p in trained.items()}).items():
        with torch.no_grad():
            if "magnitude" in key:  # it begins as the row's length
                trained[key].mul_(torch.tensor(value))
            else:
                trained[key].copy_(torch.tensor(value))


def weighted_loss(model: Any, case: Any) -> Any:
    import torch

    total = torch.zeros(())
    for tokens, targets, weights in ragged(case):
        total = total - (torch.tensor(weights) * log_probs(model, tokens, targets)).sum()
    return total


def log_probs(model: Any, tokens: Any, targets: Any) -> Any:
    import torch

    ids = torch.tensor(tokens).long()
    logits = model(ids[None], use_cache=False).logits[0]
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(ids)), torch.tensor(targets).long()]


def preference_loss(kind: str, model: Any, case: Any) -> Any:
    """The formulas of the papers, in torch's own functions."""
    import torch
    import torch.nn.functional as functional

    losses = []
    for pair in pairs_of(case):
        sums, means, bases = [], [], []
        for example in (pair.chosen, pair.rejected):
            counted = torch.tensor(example.trained[1:])
            values = log_probs(model, example.tokens[:-1], example.tokens[1:])[counted]
            sums.append(values.sum())
            means.append(values.mean())
            with torch.no_grad(), model.disable_adapter():
                base = log_probs(model, example.tokens[:-1], example.tokens[1:])[counted]
            bases.append(base.sum())
        settings = PREFERENCES[kind]
        if kind.startswith("dpo"):
            beta, smooth = settings["beta"], settings.get("label_smoothing", 0.0)
            logits = beta * ((sums[0] - bases[0]) - (sums[1] - bases[1]))
            losses.append(
                -functional.logsigmoid(logits) * (1 - smooth)
                - functional.logsigmoid(-logits) * smooth
            )
        else:
            odds = [torch.log(torch.exp(m) / (1 - torch.exp(m))) for m in means]
            losses.append(-means[0] - settings["beta"] * functional.logsigmoid(odds[0] - odds[1]))
    return torch.stack(losses).mean()


def products(parameters: Any, shapes: dict[str, list[int]]) -> dict[str, float]:
    import torch

    found = {}
    wanted = directions(shapes)
    for name, parameter in parameters:
        if parameter.grad is not None:
            direction = torch.tensor(wanted[name]).double()
            found[name] = (parameter.grad.double() * direction).sum().item()
    return found


def main() -> None:
    import torch

    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    facts: dict[str, Any] = {"full": {}, "adapters": {}}
    for name in golden_names():
        with tempfile.TemporaryDirectory() as temporary:
            facts["full"][name] = write_full(name, Path(temporary))
    for name in ADAPTERS:
        with tempfile.TemporaryDirectory() as temporary:
            facts["adapters"][name] = write_adapter(name, Path(temporary))
    GOLDEN.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{len(facts['full'])} models, {len(facts['adapters'])} adapters")


if __name__ == "__main__":
    main()
