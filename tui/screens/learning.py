"""What the model is to learn from this chat: ratings, and answers written better by hand."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalGroup
from textual.screen import ModalScreen
from textual.widgets import Static, TextArea

from localllm.tui.conversation import asked
from localllm.tui.store import Message, Store
from localllm.tui.text import plain


def rate(store: Store, message: int, rating: int) -> int:
    """Rates an answer -1 or 1; the same rating again takes it back. Returns the pairs it made.

    Where a sibling has the opposite rating, the two are a preference pair.
    """
    found = store.message(message)
    if found.role != "assistant":
        return 0
    store.edit_message(message, rating=0 if found.rating == rating else rating)
    rated = store.message(message)
    if not rated.rating:
        return 0
    made = 0
    prompt = asked(store.chat(rated.chat), store.branch(rated.parent))
    for sibling in store.children(rated.chat, rated.parent):
        if sibling.id == rated.id or sibling.rating != -rated.rating or sibling.role != rated.role:
            continue
        good, bad = (rated, sibling) if rated.rating > 0 else (sibling, rated)
        if good.content != bad.content:
            made += store.add_pair(prompt, good.content, bad.content, "rating", rated.chat)
    return made


def teach(store: Store, message: int, better: str) -> Message | None:
    """Keeps a better answer as a sibling and opens its branch; None if nothing was changed.

    It is an example to learn from, and preferred to what the model had said. What was true of the
    answer's own tokens is not of these; its tool calls stay.
    """
    found = store.message(message)
    if better.strip() == found.content.strip() or not better.strip():
        return None
    prompt = asked(store.chat(found.chat), store.branch(found.parent))
    extra = {name: value for name, value in found.extra.items() if name == "tool_calls"}
    sibling = store.add_message(
        found.chat,
        found.parent,
        "assistant",
        better,
        model=found.model,
        adapter=found.adapter,
        params=found.params,
        extra={**extra, "edited_from": found.id},
    )
    store.add_pair(prompt, better, None, "edit", found.chat)
    if found.content.strip():
        store.add_pair(prompt, better, found.content, "edit", found.chat)
    return sibling


class TeachScreen(ModalScreen[str | None]):
    """The answer as it should have been. Ctrl+S keeps it, beside what the model said."""

    DEFAULT_CSS = """
    TeachScreen { align: center middle; }
    TeachScreen > VerticalGroup {
        width: 100; max-width: 96%; height: 90%; padding: 1 2;
        background: $surface; border: round $accent;
    }
    TeachScreen TextArea, TeachScreen TextArea:focus { height: 1fr; border: none; margin-top: 1; }
    TeachScreen .note { color: $text-muted; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "keep", "Keep", priority=True),
        Binding("escape", "cancel", "Cancel", priority=True),
    ]

    def __init__(self, message: Message) -> None:
        super().__init__()
        self._message = message

    def compose(self) -> ComposeResult:
        with VerticalGroup(), Vertical():
            yield Static("Write the answer as it should have been", markup=False)
            yield Static(
                "Ctrl+S keeps it as a training example and as better than the model's own, which "
                "stays as a sibling. Escape leaves everything as it is.",
                classes="note",
                markup=False,
            )
            yield TextArea(plain(self._message.content), show_line_numbers=False)

    def on_mount(self) -> None:
        self.query_one(TextArea).focus()

    def action_keep(self) -> None:
        self.dismiss(self.query_one(TextArea).text)

    def action_cancel(self) -> None:
        self.dismiss(None)
