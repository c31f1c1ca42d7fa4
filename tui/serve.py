"""The app in a browser, for this machine only."""

from __future__ import annotations

import shlex
import sys

from localllm.errors import InvalidRequest

HOST = "127.0.0.1"


def serve_app(port: int, arguments: list[str]) -> None:
    """Serves `localllm ARGUMENTS` on http://127.0.0.1:PORT until Ctrl-C.

    Raises InvalidRequest where textual-serve is not installed or the port is taken.
    """
    try:
        from aiohttp import web
        from textual_serve.server import Server
    except ImportError:
        raise InvalidRequest(
            "--serve needs the package textual-serve",
            hint="pip install 'localllm[browser]'",
        ) from None
    _refuse_taken(port)
    own = {f"http://{name}:{port}" for name in (HOST, "localhost")}

    class LocalServer(Server):  # type: ignore[misc,unused-ignore]  # without types where absent
        """Refuses pages of other sites: a browser lets them reach 127.0.0.1 too."""

        async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
            if request.headers.get("Origin") not in own:
                raise web.HTTPForbidden(text="only pages of this server may open the app")
            return await super().handle_websocket(request)

    program = "from localllm.cli import main; main()"
    command = shlex.join([sys.executable, "-c", program, *arguments])
    print(f"The app is at http://{HOST}:{port} on this machine; Ctrl-C ends it.", file=sys.stderr)
    LocalServer(command, host=HOST, port=port, title="localllm").serve()


def _refuse_taken(port: int) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InvalidRequest(
                f"port {port} of {HOST} cannot be used: {error.strerror or error}",
                hint="--port takes another",
            ) from error
