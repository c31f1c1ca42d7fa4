"""The tokenizers that tests of conversations use."""

from tests.tokenizer.conftest import (  # noqa: F401
    build,
    gemma3_metadata,
    gemma3_tokenizer,
    smollm2_metadata,
    smollm2_tokenizer,
    trained,
)
