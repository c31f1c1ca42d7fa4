"""Functions that a model may call: built in ones, and those of MCP servers. All off until chosen.

AppTools (box.py) knows them all -> Caller (caller.py) makes calls that may be made
ToolLoop (loop.py) has an engine answer in rounds, without an app
"""

from localllm.tui.tools.box import AppTools
from localllm.tui.tools.caller import Caller
from localllm.tui.tools.loop import Called, ToolLoop, Turn
from localllm.tui.tools.tool import Call, Outcome, Tool

__all__ = ["AppTools", "Call", "Called", "Caller", "Outcome", "Tool", "ToolLoop", "Turn"]
