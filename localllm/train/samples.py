"""Sample answers along the way: the engine with the adapter as it is now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from localllm.llm import LLM
from localllm.sampling import SamplingParams


class Sampler:
    """Answers the same prompts greedily whenever asked. Holds a second copy of the model."""

    def __init__(
        self,
        model: str,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        threads: int | None = None,
        chat_template: str | None = None,
        offline: bool | None = None,
    ) -> None:
        self._prompts = list(prompts)
        self._params = SamplingParams(temperature=0, max_tokens=max_tokens)
        self._llm = LLM(
            model,
            threads=threads,
            max_batch=len(self._prompts),
            chat_template=chat_template,
            offline=offline,
        )

    def answers(self, save: Callable[[Path], None]) -> list[str]:
        """save: writes the adapter into a folder."""
        with TemporaryDirectory(prefix="localllm-samples-") as folder:
            place = Path(folder) / "adapter"
            save(place)
            name = self._llm.load_adapter(place)
            try:
                return self._generate(name)
            finally:
                self._llm.unload_adapter(name)

    def _generate(self, adapter: str) -> list[str]:
        tokenizer = self._llm.tokenizer
        prompts: list[str | list[int]] = list(self._prompts)
        if tokenizer is not None and tokenizer.chat_template is not None:
            prompts = [self._llm.chat_prompt([_said(prompt)]) for prompt in self._prompts]
        results = self._llm.generate(prompts, self._params, adapter=adapter)
        return [result.text for result in results]

    def close(self) -> None:
        self._llm.close()


def _said(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}
