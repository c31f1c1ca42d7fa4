"""`localllm chat`: which of its faces opens, and what makes no sense is refused."""

from __future__ import annotations

import asyncio
import socket

import pytest

from localllm.errors import InvalidRequest


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--resume", "--new"), "give one of them"),
        (("--serve", "--plain"), "give one of them"),
        (("one", "--model", "two"), "given twice"),
        (("--resume",), "line by line nothing is kept"),
        (("--plain", "--resume"), "line by line nothing is kept"),
        (("--serve", "--port", "0"), "--port"),
    ],
)
def test_options_that_contradict_each_other_are_bad_usage(localllm, options, named):
    done = localllm("chat", *options)
    assert done.returncode == 2
    assert named in " ".join(done.stderr.replace("│", " ").split())


def test_plain_and_model_as_an_option_are_the_conversation_line_by_line(localllm, tiny):
    sampling = ("--temperature", 0, "--max-tokens", 6)
    plain = localllm("chat", "--plain", "--model", tiny, *sampling, stdin="hello\n")
    assert plain.returncode == 0
    assert plain.stdout == localllm("chat", tiny, *sampling, stdin="hello\n").stdout


def test_a_port_that_is_taken_is_told():
    pytest.importorskip("textual_serve")
    from localllm.tui.serve import serve_app

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InvalidRequest, match="cannot be used"):
            serve_app(taken.getsockname()[1], [])


def test_pages_of_other_sites_cannot_open_the_served_app(monkeypatch):
    pytest.importorskip("textual_serve")
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer
    from textual_serve import server as served

    from localllm.tui.serve import serve_app

    async def opened(self, request):
        return web.Response(text="the app")

    made = []
    monkeypatch.setattr(served.Server, "handle_websocket", opened)
    monkeypatch.setattr(served.Server, "serve", lambda self: made.append(self))
    serve_app(18765, [])
    (server,) = made
    assert server.host == "127.0.0.1"

    async def status(origin: str | None) -> int:
        app = await server._make_app()
        app.on_startup.clear()
        app.on_shutdown.clear()
        async with TestClient(TestServer(app)) as client:
            headers = {} if origin is None else {"Origin": origin}
            return (await client.get("/ws", headers=headers)).status

    assert asyncio.run(status("http://evil.example")) == 403
    assert asyncio.run(status(None)) == 403
    assert asyncio.run(status("http://127.0.0.1:18765")) == 200
