"""What huggingface_hub raises, told as our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from localllm.errors import DownloadError, LocalLLMError, ModelNotFound
from localllm.hub.disk import store_error
from localllm.hub.environment import hub_endpoint
from localllm.hub.refs import HubRef

# The base of the HTTP client's errors, whichever client the library was built on.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]


class BrokenOffError(Exception):
    """The connection was lost in the middle of a file; what came so far is kept."""


@contextmanager
def telling_hub_errors(
    ref: HubRef, file: str | None = None, *, into: Path | None = None
) -> Iterator[None]:
    """Raises DownloadError, ModelNotFound or StoreError for what goes wrong inside the block,
    and BrokenOffError for a connection lost while content is written to the folder `into`."""
    try:
        yield
    except LocalLLMError:
        raise
    except HfHubHTTPError as error:
        raise _refusal(ref, file, error) from error
    except OfflineModeIsEnabled as error:
        raise DownloadError(
            f"{ref} cannot be fetched: HF_HUB_OFFLINE was set when the program started",
            hint="unset HF_HUB_OFFLINE and start again",
        ) from error
    except _HttpError as error:
        if into is not None:
            raise BrokenOffError(first_line(error)) from error
        raise DownloadError(
            f"{ref}: the hub at {_hub()} cannot be reached ({first_line(error)})",
            hint="check the network, and HF_ENDPOINT if it is set",
        ) from error
    except (EntryNotFoundError, FileMetadataError, ValueError) as error:
        raise DownloadError(f"{ref}: {first_line(error)}") from error
    except OSError as error:
        if into is None:
            raise DownloadError(f"{ref}: {first_line(error)}") from error
        if error.errno is not None:
            raise store_error(error, into) from error
        # The library's own complaint that the file came out short.
        raise BrokenOffError(first_line(error)) from error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _hub() -> str:
    return hub_endpoint() or constants.ENDPOINT


def _refusal(ref: HubRef, file: str | None, error: HfHubHTTPError) -> LocalLLMError:
    """An answer that is not the one we wanted, by its status and the library's reading of it."""
    page = f"{_hub()}/{ref.repo}"
    status = error.response.status_code
    if isinstance(error, GatedRepoError) or (status in (401, 403) and file is not None):
        whose = "a token of the account that accepted it" if get_token() else "your access token"
        return DownloadError(
            f"{ref} is gated: its owner asks for the licence to be accepted first",
            hint=f"accept it at {page}, then set HF_TOKEN to {whose}",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(
            f"hf:{ref.repo} has no revision {ref.revision or 'main'!r}",
            hint="leave @revision out for the newest, or name a branch, tag or commit",
        )
    if isinstance(error, RepositoryNotFoundError) or (status == 404 and file is None):
        return ModelNotFound(
            f"there is no repository {ref.repo} on the hub, or it is private or gated",
            hint=f"check the spelling; if it is there, accept its licence at {page} "
            "and set HF_TOKEN to your access token",
        )
    if status == 404:
        return DownloadError(f"hf:{ref.repo} has no file {file}")
    if status in (401, 403):
        return DownloadError(
            f"{ref}: the hub at {_hub()} refused access ({status})",
            hint="check HF_TOKEN: the token is wrong, has expired, or may not read this",
        )
    if status == 429:
        return DownloadError(
            f"{ref}: the hub asks to slow down (too many requests)",
            hint="wait some minutes, or set HF_TOKEN",
        )
    return DownloadError(
        f"{ref}: the hub at {_hub()} answered {status}",
        hint="try again later" if status >= 500 else None,
    )
