"""Chats as files: out as Markdown or JSON lines, in from these, ChatGPT and Open WebUI."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.tui.actions.chats import chosen
from localllm.tui.commands import Command, register
from localllm.tui.store import Chat

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_LONGEST = 40  # characters of a title in a file's name


def export(app: ChatApp, argument: str) -> None:
    chat = chosen(app)
    if argument:
        _export(app, chat, _path(argument))
    else:
        app.run_worker(
            _ask(
                app,
                "File to write (.md: the open branch to read, .jsonl: everything)",
                f"{_stem(chat)}.md",
                lambda path: _export(app, chat, path),
            ),
            group="dialog",
        )


def export_all(app: ChatApp, argument: str) -> None:
    if argument:
        _export_all(app, _path(argument))
    else:
        app.run_worker(
            _ask(
                app,
                "File for all chats",
                time.strftime("~/localllm-chats-%Y-%m-%d.jsonl"),
                lambda path: _export_all(app, path),
            ),
            group="dialog",
        )


def import_chats(app: ChatApp, argument: str) -> None:
    def begin(path: Path) -> None:
        app.run_worker(_import(app, path), group="import")

    if argument:
        begin(_path(argument))
    else:
        question = "File to read: JSONL or Markdown of localllm, ChatGPT's export, Open WebUI's"
        app.run_worker(_ask(app, question, "", begin), group="dialog")


async def _ask(app: ChatApp, question: str, value: str, then: Callable[[Path], None]) -> None:
    from localllm.tui.widgets.confirm import AskText

    typed = await app.push_screen_wait(AskText(question, value))
    if typed:
        try:
            then(_path(typed))
        except LocalLLMError as error:
            app.tell(error)


def _export(app: ChatApp, chat: Chat, path: Path) -> None:
    from localllm.tui.exchange import write_jsonl, write_markdown

    _new(path)
    if path.suffix.lower() == ".jsonl":
        write_jsonl(app.store, path, [chat.id])
    elif path.suffix.lower() in (".md", ".markdown"):
        write_markdown(app.store, chat.id, path)
    else:
        raise InvalidRequest(f"{path.name}: its ending must be .md or .jsonl")
    app.say(f"written to {path}")


def _export_all(app: ChatApp, path: Path) -> None:
    from localllm.tui.exchange import write_jsonl

    _new(path)
    count = write_jsonl(app.store, path)
    app.say(f"{_chats(count)} written to {path}")


async def _import(app: ChatApp, path: Path) -> None:
    from localllm.tui.exchange import import_file

    try:
        done = await import_file(app.store, path)
    except LocalLLMError as error:
        app.tell(error)
        return
    told = f"{_chats(len(done.chats))} from {done.form}"
    if done.known:
        told += f"; {done.known:,} were here already"
    app.say(told)
    if done.wrong:
        app.warn(f"not read: {done.wrong[0]}" + (_others(len(done.wrong) - 1)))
    app.chat_screen.chats_changed()
    if len(done.chats) == 1:
        await app.open_chat(done.chats[0])


def _new(path: Path) -> None:
    if path.exists():
        raise InvalidRequest(f"{path} is there already", hint="choose another name")


def _path(typed: str) -> Path:
    text = typed.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # no home of that name
        raise InvalidRequest(f"{text}: {error}") from error


def _stem(chat: Chat) -> str:
    """A title as the name of a file."""
    words = re.sub(r"[^\w.-]+", "-", chat.title).strip("-.")[:_LONGEST].strip("-.")
    return f"~/{words or f'chat-{chat.id}'}"


def _chats(count: int) -> str:
    return "1 chat" if count == 1 else f"{count:,} chats"


def _others(count: int) -> str:
    return f", and {count:,} more" if count else ""


register(
    Command(
        "export",
        "Export",
        "Write the chat to a file: Markdown to read, JSONL with every branch",
        "Chats",
        export,
        slash="export",
        argument="[FILE]",
    ),
    Command(
        "export-all",
        "Export all chats",
        "Write every chat, with every branch, to a JSONL file",
        "Chats",
        export_all,
        slash="export-all",
        argument="[FILE]",
    ),
    Command(
        "import",
        "Import chats",
        "Read chats from a file of localllm, ChatGPT or Open WebUI; those here already are left",
        "Chats",
        import_chats,
        slash="import",
        argument="[FILE]",
    ),
)
