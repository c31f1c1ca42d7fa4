"""Errors of ours become notices, wherever in the app they are raised."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.message import Message

from localllm.errors import LocalLLMError
from localllm.tui.text import plain

if TYPE_CHECKING:
    from textual.message_pump import MessagePump as _Pump
else:
    _Pump = object


class Telling(_Pump):
    """For an app or a screen: an error in the handler of a message, such as that of a full disk, is
    told, where Textual would end the app."""

    NOTICE_SECONDS: ClassVar[float] = 10  # that an error is shown

    def tell(self, error: LocalLLMError | str) -> None:
        """An error as a notice, with its way out."""
        text = str(error)
        if isinstance(error, LocalLLMError) and error.hint:
            text += f"\n{error.hint}"
        self.app.notify(plain(text), severity="error", markup=False, timeout=self.NOTICE_SECONDS)

    async def _dispatch_message(self, message: Message) -> None:
        try:
            await super()._dispatch_message(message)
        except LocalLLMError as error:
            self.tell(error)
