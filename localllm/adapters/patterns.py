"""Regular expressions out of a file that anybody may have written.

PEFT takes the keys of rank_pattern and alpha_pattern for such. A hostile one can keep Python's `re`
busy for years, so only those that cannot are run: few repeats, none of a group.
"""

from __future__ import annotations

import re
from pathlib import Path

from localllm.errors import CheckpointError, UnsupportedModel

MAX_NAME = 300
_MAX_PATTERN = 500
_MAX_REPEATS = 2


def pattern(path: Path, key: str, text: str) -> re.Pattern[str]:
    """To be matched with a whole module name, of at most `MAX_NAME` characters.

    Raises UnsupportedModel for one that may take long, CheckpointError for one that is malformed.
    """
    bare = re.sub(r"\\.", "", text).replace("(?", "(")
    repeats = len(re.findall(r"[*+?{]", bare))
    if len(text) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+?{]", bare):
        raise UnsupportedModel(
            f"{path}: {key} has a pattern that could take forever to match: {text[:60]!r}",
            hint="Name the modules in full, as in 'layers.0.self_attn.q_proj'.",
        )
    try:
        return re.compile(rf"(.*\.)?({text})")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {key} has a malformed pattern {text[:60]!r}: {error}"
        ) from error
