"""Writes tests/adapters/saved_golden: what PEFT makes of the adapters that `save_adapter` writes.

The models are those of tests/models/golden, the adapters those of tests/adapters/saved.py. PEFT
must take every tensor of them; whether it finds ones missing or too many is checked here.

    python -m scripts.goldens.saved_adapters [case …]
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # instead of this folder, whose modules hide libraries by their names
    sys.path[0] = str(ROOT)

from scripts.goldens.models import _load  # noqa: E402
from tests.adapters.saved import CASES, FOLDER, Saved  # noqa: E402


def peft_logits(case: Saved, folder: Path) -> np.ndarray:
    """float32 [T, V], of the adapter that the case saves into `folder`."""
    import torch
    from peft import PeftModel

    base = case.base
    base.write(folder / "model")
    adapter = case.save(folder / "model", folder / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing and unexpected keys are told as warnings
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Said of ranks of parameters though they are taken: the shapes would not fit otherwise.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        adapted = PeftModel.from_pretrained(_load(base.config, folder / "model"), adapter).eval()
    with torch.no_grad():
        logits = adapted(torch.tensor([base.tokens]), use_cache=False).logits[0]
    found: np.ndarray = logits.numpy()
    return found


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or CASES:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as temporary:
            logits = peft_logits(case, Path(temporary))
        np.savez_compressed(FOLDER / f"{name}.npz", logits=logits)
        moved = np.abs(logits - case.base.whole).max() / np.abs(case.base.whole).max()
        print(f"{name}: largest logit {np.abs(logits).max():.2f}, moved by {moved:.2f}")


if __name__ == "__main__":
    main()
