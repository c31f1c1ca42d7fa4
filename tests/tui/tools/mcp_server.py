"""A small MCP server, run by the tests as a user's would be."""

from __future__ import annotations

import asyncio
import os
import sys

if "--broken" in sys.argv:
    sys.exit("no configuration found")

from mcp.server import MCPServer

server = MCPServer("test")


@server.tool()
def greet(name: str) -> str:
    """Greets somebody."""
    return f"Hello, {name}, from {os.environ.get('PLACE', 'nowhere')}"


@server.tool()
def secret() -> str:
    """What of the environment it sees."""
    return " ".join(sorted(os.environ))


@server.tool()
def long(size: int) -> str:
    return "\x1b[31m" + "x" * size


@server.tool()
async def slow() -> str:
    await asyncio.sleep(60)
    return "done"


@server.tool()
def fail() -> str:
    raise ValueError("it is Sunday")


@server.tool()
def die() -> str:
    os._exit(3)


if __name__ == "__main__":
    server.run()
