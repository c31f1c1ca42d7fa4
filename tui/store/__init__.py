"""Everything the chat app keeps: chats as trees of messages, prompts, presets, training pairs."""

from localllm.tui.store.records import Chat, Hit, Message, Pair, Preset, Prompt, Status
from localllm.tui.store.store import Store

__all__ = ["Chat", "Hit", "Message", "Pair", "Preset", "Prompt", "Status", "Store"]
