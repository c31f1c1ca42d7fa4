"""What this machine and this installation have, one function a subject, for `localllm doctor`."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PURPOSE = {
    "test": "running the tests",
    "parity": "comparing with the original implementations",
    "bench": "plots of measurements",
    "dev": "linting and type checks",
}


@dataclass(frozen=True)
class Problem:
    """Something essential that is missing, and how to get it."""

    what: str
    hint: str | None = None


@dataclass(frozen=True)
class Section:
    """One subject: `facts` for --json, `lines` for people."""

    title: str
    facts: Any
    lines: list[str]
    problems: list[Problem] = field(default_factory=list)


def examine() -> list[Section]:
    """Looks at everything; a part that is broken is reported, never raised."""
    return [
        _python(),
        _system(),
        _processor(),
        _memory(),
        _mlx(),
        _backends(),
        _store(),
        _packages(),
    ]


def _python() -> Section:
    version = platform.python_version()
    facts = {"version": version, "executable": sys.executable}
    return Section("Python", facts, [f"{version}, {sys.executable}"])


def _system() -> Section:
    if sys.platform == "darwin":
        name = f"macOS {platform.mac_ver()[0]}"
    else:
        name = f"{platform.system()} {platform.release()}"
    facts = {"name": name, "architecture": platform.machine()}
    return Section("System", facts, [f"{name}, {platform.machine()}"])


def _processor() -> Section:
    from localllm.machine import cores, cpu_model

    model, found = cpu_model(), cores()
    features: list[str] = []
    kernels: list[str] = []
    problems = []
    try:
        from localllm.kernels_cpu._native import cpu_features, usable_kernels

        features, kernels = list(cpu_features()), list(usable_kernels())
    except ImportError as error:
        problems.append(
            Problem(
                f"the native module is not built ({error})",
                "install localllm again where a C++ compiler is",
            )
        )
    count = f"{found.usable} of {found.installed} cores usable"
    if found.quota is not None:
        count += f" (the control group grants {found.quota:g})"
    elif found.allowed < found.installed:
        count += " (by the process's affinity mask)"
    facts = {
        "model": model,
        "features": features,
        "kernels": kernels,
        "cores": {
            "installed": found.installed,
            "allowed": found.allowed,
            "quota": found.quota,
            "usable": found.usable,
        },
    }
    lines = [model, count, f"instruction sets: {' '.join(features) or 'none beyond the base'}"]
    if kernels:
        asked = os.environ.get("LOCALLLM_CPU") or kernels[-1]
        if asked in kernels:
            lines.append(f"kernels: {asked} will run, of {' '.join(kernels)}")
        else:
            problems.append(
                Problem(
                    f"LOCALLLM_CPU names {asked!r}, which cannot run here",
                    f"possible here: {', '.join(kernels)}",
                )
            )
    return Section("Processor", facts, lines, problems)


def _memory() -> Section:
    from localllm.hub.progress import human_bytes
    from localllm.machine import memory

    found = memory()
    line = f"{human_bytes(found.total)}, {human_bytes(found.available)} available"
    if found.limit is not None:
        line += " (limited by the control group)"
    facts = {"total": found.total, "available": found.available, "limit": found.limit}
    return Section("Memory", facts, [line])


def _mlx() -> Section:
    from importlib.metadata import version

    try:
        import mlx.core as mx

        # Only an operation shows that the device works.
        mx.eval(mx.ones(1) + 1)
        device, metal = mx.default_device().type.name, mx.metal.is_available()
    except (ImportError, RuntimeError) as error:
        package = "mlx" if sys.platform == "darwin" else "mlx[cpu]"
        problem = Problem(f"MLX does not work ({error})", f"pip install '{package}'")
        return Section("MLX", {"version": None, "error": str(error)}, ["not usable"], [problem])
    number = version("mlx")
    facts = {"version": number, "device": device, "metal": metal}
    where = "the GPU, through Metal" if device == "gpu" and metal else f"the {device.upper()}"
    return Section("MLX", facts, [f"{number}, computes on {where}"])


def _backends() -> Section:
    from localllm.backend.select import available_backends

    statuses = available_backends()
    chosen = next((status.name for status in statuses if status.available), None)
    lines = []
    for status in statuses:
        verdict = "can run" if status.available else "cannot run"
        if status.name == chosen:
            verdict = "will run"
        lines.append(f"{status.name} {verdict}: {status.reason}")
        if status.hint and not status.available:
            lines.append(f"  {status.hint}")
    problems = []
    if chosen is None:
        hints = (status.hint for status in reversed(statuses) if status.hint)
        problems.append(Problem("no backend can run here", next(hints, None)))
    facts = {
        "chosen": chosen,
        "all": [
            {"name": status.name, "available": status.available, "reason": status.reason}
            for status in statuses
        ],
    }
    return Section("Backends", facts, lines, problems)


def _store() -> Section:
    import os
    import shutil

    from localllm.backend.packed_folder import PackedFolder
    from localllm.errors import LocalLLMError
    from localllm.hub.environment import is_set
    from localllm.hub.progress import human_bytes
    from localllm.hub.store import Store

    try:
        store = Store()
        kept = store.kept()
        # The folder itself appears with the first model.
        place = next(path for path in (store.home, *store.home.parents) if path.exists())
        free, writable = shutil.disk_usage(place).free, os.access(place, os.W_OK | os.X_OK)
    except (LocalLLMError, OSError) as error:
        hint = getattr(error, "hint", None) or "set LOCALLLM_HOME to a folder that can be written"
        problem = Problem(f"the model store cannot be used: {error}", hint)
        return Section("Store", {"error": str(error)}, ["not usable"], [problem])

    damaged = [model for model in kept if model.problem is not None]
    count = len(kept) - len(damaged)
    lines = [
        str(store.home),
        f"{count} model{'' if count == 1 else 's'}, {human_bytes(free)} free on the disk",
    ]
    folder = PackedFolder(store.packed)
    used = folder.usage()
    off = "LOCALLLM_NO_PACKED_CACHE is set" if is_set("LOCALLLM_NO_PACKED_CACHE") else None
    not_kept = off or folder.obstacle()
    line = f"packed weights of {used.models} model{'' if used.models == 1 else 's'}, "
    line += human_bytes(used.nbytes)
    lines.append(line + (f"; no others are kept: {not_kept}" if not_kept else ""))
    lines += [f"damaged: {model.folder.name} ({model.problem})" for model in damaged]
    problems = []
    if not writable:
        problems.append(
            Problem(
                f"no model can be kept: {place} is not writable",
                "set LOCALLLM_HOME to a folder that can be written",
            )
        )
    facts = {
        "path": str(store.home),
        "models": count,
        "damaged": [model.folder.name for model in damaged],
        "packed": {"models": used.models, "bytes": used.nbytes, "not_kept": not_kept},
        "free": free,
        "writable": writable,
    }
    return Section("Store", facts, lines, problems)


def _packages() -> Section:
    """The dependencies that our own metadata names, and each extra's."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        own = distribution("localllm")
    except PackageNotFoundError:
        problem = Problem("localllm runs without being installed", "make setup, or pip install .")
        return Section("Extras", {"error": "not installed"}, ["unknown"], [problem])

    required: dict[str, list[str]] = {"": []}  # extra ("" for none) -> packages
    for requirement in own.requires or []:
        package, extra = _parse(requirement)
        if package not in required.setdefault(extra, []):
            required[extra].append(package)

    how = _install_command(own.read_text("direct_url.json"))
    missing = {extra: _missing(packages) for extra, packages in required.items()}
    problems = [
        Problem(f"the package {package} is missing", how.format(extra=""))
        for package in missing.pop("")
    ]
    lines = []
    for extra, packages in missing.items():
        purpose = f" ({_PURPOSE[extra]})" if extra in _PURPOSE else ""
        if packages:
            lines.append(f"{extra}{purpose}: missing {', '.join(packages)}")
            lines.append(f"  {how.format(extra=f'[{extra}]')}")
        else:
            lines.append(f"{extra}{purpose}: installed")
    if _missing(["pip"]):
        lines.append("pip is missing: models from `pypi:` cannot be fetched")
        lines.append("  python -m ensurepip")
    return Section(
        "Extras", {extra: {"missing": names} for extra, names in missing.items()}, lines, problems
    )


def _parse(requirement: str) -> tuple[str, str]:
    """'gguf<1,>=0.17; extra == "test"' -> ("gguf", "test"); the extra is "" for none."""
    import re

    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    extra = re.search(r"extra\s*==\s*[\"']([^\"']+)", requirement)
    return (name[0] if name else requirement), (extra[1] if extra else "")


def _missing(packages: Iterable[str]) -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    missing = []
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
    return missing


def _install_command(direct_url: str | None) -> str:
    """How this installation was made, with a place for the extra."""
    import json
    from urllib.parse import unquote, urlparse

    source = json.loads(direct_url) if direct_url else {}
    url = urlparse(source.get("url", ""))
    if url.scheme != "file":
        return "pip install 'localllm{extra}'"
    editable = "-e " if source.get("dir_info", {}).get("editable") else ""
    folder = str(Path(unquote(url.path))).replace("{", "{{").replace("}", "}}")
    return f"{sys.executable} -m pip install {editable}'{folder}{{extra}}'"
