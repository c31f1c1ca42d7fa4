"""All branches of a chat, with the tokens that each has of its own and shares with the open one."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Static, Tree
from textual.widgets.tree import TreeNode

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.tui.conversation import asked
from localllm.tui.store import Message
from localllm.tui.text import one_line
from localllm.tui.widgets.footer import KeyLine

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_WHO = {"user": "You", "assistant": "Model", "system": "System", "tool": "Tool"}
_MOST_COUNTED = 64  # branches


class MessageTree(Tree[int]):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", show=False),
        Binding("k", "cursor_up", show=False),
        Binding("h", "cursor_parent", show=False),
        Binding("l", "toggle_node", show=False),
        Binding("g", "scroll_home", show=False),
        Binding("G", "scroll_end", show=False),
    ]


class TreeScreen(Screen[int | None]):
    """The message whose branch is to be opened, or None.

    A turn that has no sibling follows its parent on the same level: what is indented is a branch.
    """

    DEFAULT_CSS = """
    TreeScreen MessageTree { height: 1fr; background: $background; padding: 0 1; }
    TreeScreen #facts { height: auto; padding: 0 1; color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "leave", "Back"),
        Binding("v", "compare", "Compare siblings"),
        Binding("x", "prune", "Remove"),
    ]

    def __init__(self, chat: int) -> None:
        super().__init__()
        self._chat = chat
        self._messages: dict[int, Message] = {}
        self._children: dict[int | None, list[int]] = {}
        self._open: set[int] = set()
        self._tokens: dict[int, int] = {}  # of a message, where counted
        self._placed: dict[int, TreeNode[int]] = {}

    @property
    def chat_app(self) -> ChatApp:
        return self.app  # type: ignore[return-value]

    def compose(self) -> ComposeResult:
        yield Static("", id="facts", markup=False)
        tree = MessageTree("chat")
        tree.show_root = False
        tree.guide_depth = 3
        yield tree
        yield KeyLine()

    def on_mount(self) -> None:
        self._fill()
        self.query_one(MessageTree).focus()

    def _fill(self) -> None:
        store = self.chat_app.store
        chat = store.chat(self._chat)
        self._messages = {message.id: message for message in store.tree(self._chat)}
        children: dict[int | None, list[int]] = defaultdict(list)
        for message in self._messages.values():
            children[message.parent].append(message.id)
        self._children = dict(children)
        self._open = {message.id for message in store.branch(chat.head)}
        tree = self.query_one(MessageTree)
        tree.clear()
        self._placed = {}
        # Without recursion: a chat may be deeper than Python's stack.
        waiting = [(tree.root, first) for first in reversed(self._children.get(None, []))]
        while waiting:
            parent, number = waiting.pop()
            below = self._children.get(number, [])
            node = parent.add(self._label(number), data=number, expand=True, allow_expand=True)
            self._placed[number] = node
            branches = len(below) > 1
            if not branches:
                node.allow_expand = False
            under = node if branches else parent
            waiting += [(under, child) for child in reversed(below)]
        if chat.head in self._placed:
            self.call_after_refresh(tree.move_cursor, self._placed[chat.head])
        self._show_facts()
        self.run_worker(self._count(), exclusive=True, group="count")

    def _label(self, number: int) -> Text:
        message = self._messages[number]
        mark = "● " if number in self._open else "○ "
        tokens = f"{self._tokens[number]:>6,} " if number in self._tokens else ""
        text = one_line(message.content[:400], 90) or f"({message.status})"
        rating = {1: " +", -1: " −"}.get(message.rating, "")  # noqa: RUF001
        faint = "" if number in self._open else "dim"
        return Text.assemble(
            (mark, "bold" if number in self._open else "dim"),
            (tokens, "dim"),
            (f"{_WHO.get(message.role, message.role)}{rating}: ", "bold"),
            (text, faint),
            no_wrap=True,
        )

    async def _count(self) -> None:
        """The tokens of every message, as the template sets them, and of every branch."""
        app = self.chat_app
        if app.engine.state.phase != "ready":
            self._show_facts("tokens are counted once the model is loaded")
            return
        chat = app.store.chat(self._chat)
        leaves = [n for n in self._messages if not self._children.get(n)]
        shown = []
        for leaf in sorted(leaves, reverse=True)[:_MOST_COUNTED]:
            branch = self._branch(leaf)
            messages = asked(chat, branch)
            try:
                count = await app.engine.count(messages, app.answers.offered())
            except LocalLLMError as error:
                self._show_facts(str(error))
                return
            for message, tokens in zip(reversed(branch), reversed(count.per_message), strict=False):
                self._tokens[message.id] = tokens
            shown.append((leaf, count.total))
        for number, node in self._placed.items():
            node.set_label(self._label(number))
        for leaf, total in shown:
            branch = self._branch(leaf)
            shared = sum(self._tokens.get(m.id, 0) for m in branch if m.id in self._open)
            own = sum(self._tokens.get(m.id, 0) for m in branch if m.id not in self._open)
            note = f"  ({total:,} tokens"
            if leaf not in self._open:
                note += f": {shared:,} shared with the open branch, {own:,} its own"
            label = Text.assemble(self._label(leaf), (f"{note})", "italic"))
            self._placed[leaf].set_label(label)
        self._show_facts()

    def _branch(self, leaf: int) -> list[Message]:
        branch: list[Message] = []
        number: int | None = leaf
        while number is not None:
            branch.append(self._messages[number])
            number = self._messages[number].parent
        return branch[::-1]

    def _show_facts(self, note: str = "") -> None:
        leaves = sum(1 for n in self._messages if not self._children.get(n))
        own = sum(self._tokens.values())
        branches = "1 branch" if leaves == 1 else f"{leaves} branches"
        text = f"{len(self._messages)} messages in {branches}"
        if own:
            whole = sum(
                sum(self._tokens.get(m.id, 0) for m in self._branch(n))
                for n in self._messages
                if not self._children.get(n)
            )
            text += f" · {own:,} tokens to keep where {whole:,} would be without sharing"
        text += " · Enter opens a branch"
        self.query_one("#facts", Static).update(text + (f" · {note}" if note else ""))

    @on(Tree.NodeSelected)
    def selected(self, event: Tree.NodeSelected[int]) -> None:
        event.stop()
        if event.node.data is not None:
            self.dismiss(event.node.data)

    def _chosen(self) -> Message | None:
        node = self.query_one(MessageTree).cursor_node
        return None if node is None or node.data is None else self._messages[node.data]

    def action_compare(self) -> None:
        if (message := self._chosen()) is not None:
            from localllm.tui.screens.siblings import compare_siblings

            compare_siblings(self.chat_app, message)

    def action_prune(self) -> None:
        if (message := self._chosen()) is not None:
            self.run_worker(self._prune(message), group="prune")

    async def _prune(self, message: Message) -> None:
        from localllm.tui.actions.tree import prune_message

        try:
            if await prune_message(self.chat_app, message):
                self._fill()
        except InvalidRequest as error:
            self.chat_app.tell(error)

    def action_leave(self) -> None:
        self.dismiss(None)


def show(app: ChatApp, argument: str) -> None:
    chat = app.chat
    if chat is None or chat.head is None:
        raise InvalidRequest("nothing was said in this chat yet")
    number = chat.id

    async def go() -> None:
        message = await app.push_screen_wait(TreeScreen(number))
        if message is not None:
            app.show_chat_screen()
            await app.open_chat(number, message)

    app.run_worker(go(), group="tree")
