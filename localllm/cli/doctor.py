"""`localllm doctor`: what this machine has, which backend will run, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from localllm.cli.diagnosis import Problem, Section


def doctor(
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Show which Metal kernels are used here, and why."),
    ] = False,
) -> None:
    """Show what this machine has, which backend will run, and what is missing.

    Exits with 1 if something essential is missing.
    """
    if kernels:
        from localllm.cli.kernels import show_verdicts

        show_verdicts(json)
        return
    from localllm.cli.diagnosis import examine

    sections = examine()
    problems = [problem for section in sections for problem in section.problems]
    if json:
        print(_as_json(sections, problems))
    else:
        print("\n".join(_as_text(sections, problems)))
    if problems:
        raise typer.Exit(1)


def _as_json(sections: list[Section], problems: list[Problem]) -> str:
    import json

    from localllm import __version__

    report: dict[str, Any] = {"localllm": __version__}
    report |= {section.title.lower(): section.facts for section in sections}
    report["problems"] = [{"what": problem.what, "hint": problem.hint} for problem in problems]
    return json.dumps(report, indent=2)


def _as_text(sections: list[Section], problems: list[Problem]) -> Iterator[str]:
    from localllm import __version__

    yield f"localllm {__version__}"
    for section in sections:
        for index, line in enumerate(section.lines):
            yield f"  {section.title if index == 0 else '':<11}{line}"
    yield ""
    if not problems:
        yield "Everything essential is here."
    for problem in problems:
        yield f"Problem: {problem.what}"
        if problem.hint:
            yield f"  {problem.hint}"
