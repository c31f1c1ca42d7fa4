"""The error family. A message says what was wrong and where; a hint says what to do about it."""

from __future__ import annotations


class LocalLLMError(Exception):
    """Base of every error a user can cause or meet. `hint` is the way out, or None."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ModelNotFound(LocalLLMError):
    """No model goes by this name, here or at its source."""


class DownloadError(LocalLLMError):
    """A model could not be fetched, or what arrived is not what was promised."""


class StoreError(LocalLLMError):
    """The model store on disk cannot be read or written (permissions, space, corruption)."""


class CheckpointError(LocalLLMError):
    """A model file is damaged, incomplete or of an unknown kind; names the file and the tensor."""


class UnsupportedModel(LocalLLMError):
    """The files are sound but hold an architecture, option or vocabulary we do not run."""


class TokenizerError(LocalLLMError):
    """A tokenizer cannot be built or used."""


class TemplateError(LocalLLMError):
    """A chat template is missing, malformed, or refused these messages."""


class InvalidRequest(LocalLLMError):
    """Parameters or messages that make no sense, named one by one."""


class TooManyRequests(LocalLLMError):
    """The queue is full; the same request may be taken later. HTTP knows it as 429."""


class PromptTooLong(LocalLLMError):
    """The prompt does not fit the context; nothing is ever cut in silence."""


class OutOfMemoryPlan(LocalLLMError):
    """The plan needs more memory than there is; names the knob to turn."""


class TrainingStopped(LocalLLMError):
    """A training run could not go on, with the reason; what it had saved is still there."""


class BackendUnavailable(LocalLLMError):
    """The asked-for backend cannot run on this machine, with the reason."""
