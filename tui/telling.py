"""Errors of ours become notices, wherever in the app they are raised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.message import Message

from localllm.errors import LocalLLMError

if TYPE_CHECKING:
    from textual.message_pump import MessagePump as _Pump
else:
    _Pump = object


class Telling(_Pump):
    """For an app or a screen: an error in the handler of a message, such as that of a full disk, is
    told, where Textual would end the app."""

    def tell(self, error: LocalLLMError) -> None:
        raise NotImplementedError

    async def _dispatch_message(self, message: Message) -> None:
        try:
            await super()._dispatch_message(message)
        except LocalLLMError as error:
            self.tell(error)
