"""Disk space, and operating-system errors told as what they mean for the store."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localllm.errors import StoreError
from localllm.hub.progress import human_bytes

ELSEWHERE = "set LOCALLLM_HOME to a folder that can be written, or free this one"


def require_space(needed: int, folder: Path) -> None:
    """StoreError unless `needed` bytes are free where `folder` is (or will be)."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise store_error(error, folder) from error
    if needed > free:
        raise StoreError(
            f"not enough disk space: {human_bytes(needed)} needed, {human_bytes(free)} free "
            f"in {folder}",
            hint="free some space (`localllm list` shows what is kept, `localllm rm NAME` removes "
            "it) or set LOCALLLM_HOME to a folder on a larger disk",
        )


@contextmanager
def telling_os_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a StoreError about `folder`."""
    try:
        yield
    except OSError as error:
        raise store_error(error, folder) from error


def store_error(error: OSError, folder: Path) -> StoreError:
    where = error.filename or folder
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return StoreError(
                f"the disk became full while writing to {folder}",
                hint="free some space (`localllm rm NAME` removes a model) and pull again, "
                "or set LOCALLLM_HOME to a folder on a larger disk",
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return StoreError(f"no permission to write {where}", hint=ELSEWHERE)
        case errno.ENOTDIR | errno.EEXIST:
            return StoreError(f"{where} cannot be a folder: a file is in the way", hint=ELSEWHERE)
    return StoreError(f"{where}: {error.strerror or error}", hint=ELSEWHERE)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot sync a folder; nothing is lost but the guarantee.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
