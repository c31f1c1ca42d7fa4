"""Commands that open the screens of the chat itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localllm.tui.commands import Command, register

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

# The screens are imported when they are opened: the start must not wait for them.


def help_screen(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.help import show

    show(app, argument)


def search(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.search import search

    search(app, argument)


def tree(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.tree import show

    show(app, argument)


def siblings(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.siblings import show

    show(app, argument)


register(
    Command(
        "help",
        "Help",
        "All commands and their keys",
        "App",
        help_screen,
        keys=("f1",),
        slash="help",
        shown_in_footer=True,
    ),
    Command(
        "search",
        "Search",
        "Search all that was said in every chat and branch, and go there",
        "Chats",
        search,
        keys=("ctrl+f",),
        slash="search",
        shown_in_footer=True,
        argument="[WORDS]",
    ),
    Command(
        "tree",
        "Tree",
        "All branches of this chat, with the tokens they share",
        "Tree",
        tree,
        keys=("ctrl+t",),
        slash="tree",
        where="chat",
        shown_in_footer=True,
    ),
    Command(
        "compare-siblings",
        "Side by side",
        "The chosen message (else the last answer) beside its siblings",
        "Tree",
        siblings,
        keys=("v",),
        slash="siblings",
        where="message",
    ),
)
