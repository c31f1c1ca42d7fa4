"""The engine behind the chat app: a process of its own, so that the interface never waits for it.

app -> RemoteEngine (remote.py) -> lines of JSON (wire.py) -> the child (serve.py) -> LLM
"""
