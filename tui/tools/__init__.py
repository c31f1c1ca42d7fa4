"""Functions that a model may call: built in ones, and those of MCP servers. All off until chosen.

AppTools (box.py) knows them all -> ToolLoop (loop.py) asks the engine, asks the person, calls
"""

from localllm.tui.tools.box import AppTools
from localllm.tui.tools.loop import Called, ToolLoop, Turn
from localllm.tui.tools.tool import Call, Outcome, Tool

__all__ = ["AppTools", "Call", "Called", "Outcome", "Tool", "ToolLoop", "Turn"]
