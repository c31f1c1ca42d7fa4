"""The chat as a tree: editing makes branches, answers can be given again, continued, compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localllm.errors import InvalidRequest
from localllm.tui.answers import Said, typed_of
from localllm.tui.commands import Command, register
from localllm.tui.store import Message
from localllm.tui.text import one_line

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_OF_FILES = ("attachments", "typed")  # in a message's extra


def chosen(app: ChatApp, *roles: str) -> Message:
    """The chosen message as the store has it, else the last one of these roles on the branch.

    Raises InvalidRequest where there is none.
    """
    view = app.chat_screen.transcript.chosen
    chat = app.chat
    if view is not None:
        return app.store.message(view.message.id)
    branch = [] if chat is None else app.store.branch(chat.head)
    for message in reversed(branch):
        if not roles or message.role in roles:
            return message
    raise InvalidRequest("nothing was said in this chat yet")


def _idle(app: ChatApp, message: Message) -> None:
    live = app.answers.live.get(message.chat)
    if live is not None:
        raise InvalidRequest("an answer is under way in this chat", hint="Esc stops it")


def edit(app: ChatApp, argument: str) -> None:
    message = chosen(app, "user")
    _idle(app, message)
    app.chat_screen.begin_editing(message)


async def save_edit(app: ChatApp, number: int, text: str) -> None:
    """A changed message is a new sibling, the old one stays. A user's is answered; an answer is
    learned from, as one that is taught."""
    screen = app.chat_screen
    message = app.store.message(number)
    if not text.strip():
        raise_empty(app)
        return
    if text == typed_of(message.content, message.extra):
        screen.leave_editing()
        return
    _idle(app, message)
    if message.role == "assistant":
        from localllm.tui.screens.learning import teach

        made = teach(app.store, message.id, text)
        screen.leave_editing()
        await screen.load(to=None if made is None else made.id)
        return
    said = await screen.with_files(text) if message.role == "user" else Said(text)
    if said is None:
        return
    kept = {name: value for name, value in message.extra.items() if name not in _OF_FILES}
    made = app.store.add_message(
        message.chat,
        message.parent,
        message.role,
        said.content,
        extra={**kept, **said.extra, "edited_from": message.id},
    )
    screen.leave_editing()
    if message.role == "user":
        app.answers.ask(message.chat, made.id)
    await screen.load()


def raise_empty(app: ChatApp) -> None:
    app.warn("an empty message cannot be saved; Esc leaves the edit, x removes the message")


async def regenerate(app: ChatApp, argument: str) -> None:
    """Another answer to the same question, beside the first."""
    message = chosen(app)
    _idle(app, message)
    parent = message.id if message.role in ("user", "tool") else message.parent
    app.answers.ask(message.chat, parent)
    await _to_composer(app)


async def go_on(app: ChatApp, argument: str) -> None:
    """Continues an answer where it ends; one that something follows is continued as a sibling."""
    message = chosen(app, "assistant")
    _idle(app, message)
    if message.role != "assistant":
        raise InvalidRequest("only an answer can be continued", hint="r answers a question again")
    if app.store.children(message.chat, message.id):
        message = app.store.add_message(
            message.chat,
            message.parent,
            "assistant",
            message.content,
            reasoning=message.reasoning,
            model=message.model,
            adapter=message.adapter,
            params=message.params,
            extra=message.extra,
        )
    else:
        app.store.edit_chat(message.chat, head=message.id)
    app.answers.go_on(message)
    await _to_composer(app)


async def _to_composer(app: ChatApp) -> None:
    await app.chat_screen.load()
    app.chat_screen.transcript.anchor()
    app.chat_screen.composer.focus()


async def _sibling(app: ChatApp, by: int) -> None:
    message = chosen(app)
    siblings = app.store.siblings(message.id)
    place = siblings.index(message.id) + by
    if not 0 <= place < len(siblings):
        return
    other = siblings[place]
    app.store.edit_chat(message.chat, head=app.store.newest_leaf(other))
    await app.chat_screen.load(to=other)


async def previous_sibling(app: ChatApp, argument: str) -> None:
    await _sibling(app, -1)


async def next_sibling(app: ChatApp, argument: str) -> None:
    await _sibling(app, 1)


def prune(app: ChatApp, argument: str) -> None:
    app.run_worker(prune_message(app, chosen(app)), group="prune")


async def prune_message(app: ChatApp, message: Message) -> bool:
    """Asks, then removes the message with all that follows it. False where the user refused."""
    from localllm.tui.widgets.confirm import Confirm

    _idle(app, message)
    count = count_below(app, message)
    following = "message that follows" if count == 1 else f"{count} messages that follow"
    more = f" and the {following} it" if count else ""
    question = f"Remove this message{more}?\n\n{one_line(message.content, 200)}"
    if not await app.push_screen_wait(Confirm(question, yes="Remove", no="Keep")):
        return False
    app.store.prune(message.id)
    await app.chat_screen.load()
    app.chat_screen.composer.focus()
    return True


def count_below(app: ChatApp, message: Message) -> int:
    """How many messages follow it, in all branches."""
    below = {message.id}
    for other in app.store.tree(message.chat):
        if other.parent in below:
            below.add(other.id)
    return len(below) - 1


async def next_message(app: ChatApp, argument: str) -> None:
    await app.chat_screen.transcript.move(1)


async def previous_message(app: ChatApp, argument: str) -> None:
    await app.chat_screen.transcript.move(-1)


async def first_message(app: ChatApp, argument: str) -> None:
    chat = app.chat
    branch = [] if chat is None else app.store.branch(chat.head)
    if branch:
        await app.chat_screen.load(to=branch[0].id)


async def last_message(app: ChatApp, argument: str) -> None:
    chat = app.chat
    if chat is not None and chat.head is not None:
        await app.chat_screen.load(to=chat.head)
    app.chat_screen.transcript.choose_last()
    app.chat_screen.transcript.anchor()


def copy(app: ChatApp, argument: str) -> None:
    message = chosen(app, "assistant")
    app.copy_to_clipboard(message.content)
    app.say("copied")


def unfold(app: ChatApp, argument: str) -> None:
    if (view := app.chat_screen.transcript.chosen) is not None:
        view.unfold()


register(
    Command(
        "edit",
        "Edit",
        "Edit the chosen message (else your last one); it becomes a new branch",
        "Tree",
        edit,
        keys=("e",),
        slash="edit",
        where="message",
        shown_in_footer=True,
    ),
    Command(
        "regenerate",
        "Answer again",
        "Another answer to the same question, beside the first",
        "Tree",
        regenerate,
        keys=("r",),
        slash="again",
        where="message",
        shown_in_footer=True,
    ),
    Command(
        "regenerate-last",
        "Answer the last question again",
        "Another answer to the last question, beside the first",
        "Tree",
        regenerate,
        keys=("ctrl+r",),
        where="chat",
    ),
    Command(
        "continue",
        "Continue",
        "Let the model go on where the answer ends",
        "Tree",
        go_on,
        keys=("c",),
        slash="continue",
        where="message",
        shown_in_footer=True,
    ),
    Command(
        "previous-sibling",
        "Previous branch",
        "The message before this one among those that follow the same message",
        "Tree",
        previous_sibling,
        keys=("h", "alt+left"),
        where="message",
    ),
    Command(
        "next-sibling",
        "Next branch",
        "The message after this one among those that follow the same message",
        "Tree",
        next_sibling,
        keys=("l", "alt+right"),
        where="message",
    ),
    Command(
        "prune",
        "Remove",
        "Remove the chosen message and all that follows it, after a question",
        "Tree",
        prune,
        keys=("x",),
        slash="prune",
        where="message",
        shown_in_footer=True,
    ),
    Command(
        "next-message", "Next", "Choose the next message", "Message", next_message, keys=("j",),
        where="message",
    ),
    Command(
        "previous-message", "Previous", "Choose the previous message", "Message",
        previous_message, keys=("k",), where="message",
    ),
    Command(
        "first-message", "First", "Choose the first message", "Message", first_message,
        keys=("g",), where="message",
    ),
    Command(
        "last-message", "Last", "Choose the last message", "Message", last_message, keys=("G",),
        where="message",
    ),
    Command(
        "copy",
        "Copy",
        "Copy the chosen message (else the last answer) as it was written",
        "Message",
        copy,
        keys=("y",),
        slash="copy",
        where="message",
        shown_in_footer=True,
    ),
    Command(
        "unfold",
        "Show all",
        "Show or fold what is long: a message of yours, the thinking of an answer",
        "Message",
        unfold,
        keys=("o", "enter"),
        where="message",
    ),
)  # fmt: skip
