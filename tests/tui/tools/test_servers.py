"""MCP servers, with a real one in a process of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from localllm.errors import InvalidRequest
from localllm.tui.tool_settings import ToolSettings
from localllm.tui.tools.box import AppTools
from localllm.tui.tools.servers import read_servers
from localllm.tui.tools.tool import MOST_RESULT, ToolFailed

SCRIPT = Path(__file__).with_name("mcp_server.py")
ON = ToolSettings(servers=True)


def write(folder: Path, **servers: str) -> Path:
    text = "".join(
        f'[servers.{name}]\ncommand = "{sys.executable}"\nargs = ["{SCRIPT}", {args}]\n'
        'env = { PLACE = "here" }\ntimeout = 4\n'
        for name, args in servers.items()
    )
    (folder / "mcp.toml").write_text(text)
    return folder


def run(folder: Path, scenario: Callable[[AppTools], Awaitable[None]]) -> None:
    async def whole() -> None:
        box = AppTools(folder, ON)
        box.start()
        try:
            await asyncio.wait_for(scenario(box), 60)
        finally:
            await box.close()

    asyncio.run(whole())


def test_a_servers_tools_are_found_and_called(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIVATE_TOKEN", "abc")

    async def scenario(box: AppTools) -> None:
        assert box.servers()[0].state == "starting"
        await box.settled()
        (facts,) = box.servers()
        assert (facts.state, facts.tools, facts.error) == ("running", 6, "")
        tools = {tool.name: tool for tool in box.tools()}
        greet = tools["kind/greet"]
        assert (greet.called, greet.source, greet.harmless) == ("kind__greet", "kind", False)
        assert greet.description == "Greets somebody."
        assert greet.schema["function"]["parameters"]["required"] == ["name"]
        assert await greet.call({"name": "Ada"}) == "Hello, Ada, from here"
        assert "PRIVATE_TOKEN" not in await tools["kind/secret"].call({})
        long = await tools["kind/long"].call({"size": 3 * MOST_RESULT})
        assert long == "x" * (3 * MOST_RESULT)  # who asks for it bounds it
        with pytest.raises(ToolFailed, match="fail"):
            await tools["kind/fail"].call({})
        with pytest.raises(ToolFailed, match="within 4 seconds"):
            await tools["kind/slow"].call({})
        assert await greet.call({"name": "Ada"}) == "Hello, Ada, from here"
        # Nothing is offered to a model before it was turned on.
        assert box.on() == []
        box.changed(ON.turned("kind/greet", True))
        assert [tool.called for tool in box.on()] == ["kind__greet"]

    run(write(tmp_path, kind=""), scenario)


def test_what_dies_or_does_not_start_says_why_and_the_others_go_on_until_turned_off(tmp_path):
    folder = write(tmp_path, one="", two="", broken='"--broken"')
    with (folder / "mcp.toml").open("a") as file:
        file.write('[servers.missing]\ncommand = "no-such-program-anywhere"\n')

    async def scenario(box: AppTools) -> None:
        await box.settled()
        facts = {server.name: server for server in box.servers()}
        assert facts["broken"].state == "failed"
        assert "no configuration found" in facts["broken"].error
        assert facts["missing"].state == "failed"
        assert facts["missing"].error == "there is no no-such-program-anywhere"
        tools = {tool.name: tool for tool in box.tools()}
        with pytest.raises(ToolFailed):
            await tools["one/die"].call({})
        assert "Ada" in await tools["two/greet"].call({"name": "Ada"})
        async with asyncio.timeout(20):
            while box.servers()[0].state != "failed":
                await asyncio.sleep(0.1)
        assert "one/greet" not in {tool.name for tool in box.tools()}
        box.changed(ON)  # once more
        await box.settled()
        assert [server.state for server in box.servers()[:2]] == ["running", "running"]
        tool = box.tools()[-1]
        box.changed(ToolSettings())
        assert all(server.state == "off" for server in box.servers())
        await asyncio.sleep(0)
        await box.close()
        with pytest.raises(ToolFailed, match="not running"):
            await tool.call({})

    run(folder, scenario)


def test_nothing_starts_unless_servers_are_on(tmp_path):
    write(tmp_path, kind="")
    box = AppTools(tmp_path)
    box.start()
    assert [(server.name, server.state) for server in box.servers()] == [("kind", "off")]
    assert [tool.name for tool in box.tools()] == ["calculator", "time"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("servers = 3", "tables"),
        ("[servers.a]\nargs = []", "needs a command"),
        ("[servers.a]\ncommand = 3", "wrong type"),
        ('[servers.a]\ncommand = "x"\nargs = [1]', "hold texts"),
        ('[servers.a]\ncommand = "x"\ncomand = "y"', "'comand'"),
        ('[servers.a]\ncommand = "x"\ntimeout = -1', "timeout"),
        ("[servers.a\n", "mcp.toml"),
        ("\n".join(f'[servers.s{n}]\ncommand = "x"' for n in range(40)), "32"),
    ],
)
def test_a_wrong_file_is_told_of(tmp_path, text, why):
    path = tmp_path / "mcp.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=why):
        read_servers(path)
    box = AppTools(tmp_path, ON)
    box.start()
    (facts,) = box.servers()
    assert facts.state == "failed"
    assert "mcp.toml" in facts.error
