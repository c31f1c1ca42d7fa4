"""Opening the app from the command line."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path

from localllm.tui.first_frame import first_frame
from localllm.tui.opening import Opening
from localllm.tui.places import SETTINGS, config_folder, database
from localllm.tui.settings import read_settings

__all__ = ["Opening", "start"]


def start(opening: Opening) -> None:
    """Runs the app until the user leaves it. Raises StoreError where the chats cannot be opened."""
    # What is imported stays; looking for garbage in it takes a tenth of the start.
    gc.disable()
    config = config_folder()
    settings, problems = read_settings(config / SETTINGS)
    with first_frame(settings):
        from localllm.tui.app import ChatApp
        from localllm.tui.engine.cores import APP, Cores
        from localllm.tui.engine.remote import RemoteEngine
        from localllm.tui.screens import chat as chat_screen  # noqa: F401  the app opens it
        from localllm.tui.store import Store

        if opening.adapter is not None:
            # The chat keeps it, and may be opened from another folder.
            opening = replace(opening, adapter=str(Path(opening.adapter).expanduser().absolute()))
        store = Store(database())
    with store:
        cores = Cores()
        engine = RemoteEngine(cores=cores)
        app = ChatApp(store, engine, settings, opening, config=config, problems=problems)
        cores.run(app.run_async(), APP)
        chat = app.chat_id
    if app.return_code:
        sys.exit(app.return_code)
    if chat is not None:
        print("localllm chat --resume opens this chat again.", file=sys.stderr)
