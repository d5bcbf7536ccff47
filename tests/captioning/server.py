"""A server with OpenAI's interface for chats on this machine, which answers well, or fails, stalls and lies as told."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from aiohttp import web
from PIL import Image

KEY = "sk-a-secret-of-this-test"
Behaviour = str | Callable[[dict[str, Any]], web.Response]


def answer(text: Any, finish: str = "stop", usage: Any = None, **message: Any) -> web.Response:
    usage = {"prompt_tokens": 100, "completion_tokens": 10} if usage is None else usage
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return web.json_response({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


def error(status: int, message: str = "", code: str = "", **headers: str) -> web.Response:
    body = {"error": {"message": message, "type": "error", "code": code or None}}
    return web.json_response(body, status=status, headers=headers)


LOOP = "A dog on a lawn. " + "The dog is happy. " * 12
BEHAVIOURS: dict[str, Callable[[], web.Response]] = {
    "refuse": lambda: answer("I'm sorry, but I can't help with identifying people in images."),
    "refusal_field": lambda: answer(None, refusal="no"),
    "filtered": lambda: answer("", finish="content_filter"),
    "loop": lambda: answer(LOOP, finish="length"),
    "cut": lambda: answer("A dog runs over a lawn. Behind it there is a hou", finish="length"),
    "cut_at_once": lambda: answer("A dog that runs over a lawn and", finish="length"),
    "empty": lambda: answer("  \n"),
    "null": lambda: answer(None),
    "parts": lambda: answer([{"type": "text", "text": "A dog in parts."}]),
    "number": lambda: answer(42),
    "no_json": lambda: web.Response(text="<html>busy</html>", content_type="text/html"),
    "no_choices": lambda: web.json_response({"choices": []}),
    "list": lambda: web.json_response([1, 2]),
    "nested": lambda: web.Response(text="[" * 100_000, content_type="application/json"),
    "huge": lambda: web.Response(body=b" " * (5 << 20), content_type="application/json"),
    "bad_usage": lambda: answer("A dog with a bad bill.", usage={"prompt_tokens": -5, "completion_tokens": "many"}),
    "500": lambda: error(500),
    "503": lambda: error(503, **{"Retry-After": "0"}),
    "400": lambda: error(400, "the image is too large", "bad_image"),
    "401": lambda: error(401, f"Incorrect API key provided: {KEY}"),
    "404": lambda: error(404, "The model `x` does not exist"),
    "429": lambda: error(429, "slow down", **{"Retry-After": "1"}),
    "no_money": lambda: error(429, "You exceeded your current quota", "insufficient_quota"),
    "redirect": lambda: web.Response(status=307, headers={"Location": "http://127.0.0.1:9/v1/chat/completions"}),
}


@dataclass
class Server:
    """What it was asked, and how it is to behave: by the first word of the prompt, one behaviour for each request."""

    url: str = ""
    script: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    always: str = ""
    delay: float = 0.0
    asked: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    authorization: set[str] = field(default_factory=set)
    at_once: int = 0
    most_at_once: int = 0

    def times(self, name: str) -> list[float]:
        return [when for when, asked, _ in self.asked if asked == name]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        *_, user = body["messages"]
        text, image = user["content"]
        url = image["image_url"]["url"]
        assert url.startswith("data:image/jpeg;base64,")
        size = Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))).size
        name = text["text"].partition(" ")[0]
        self.asked.append((time.monotonic(), name, body))
        self.authorization.add(request.headers.get("Authorization", ""))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.delay)
            behaviour = self.script[name].pop(0) if self.script.get(name) else self.always
            if behaviour == "stall":
                await asyncio.sleep(600)
            if behaviour == "hang_up":
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            if behaviour:
                return BEHAVIOURS[behaviour]()
            self.answered[name] += 1
            return answer(f"A scene of {size[0]} by {size[1]} pixels, asked about {name}.")
        finally:
            self.at_once -= 1

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny-vl"}, {"id": "other"}]})


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/chat/completions", server.chat)
        app.router.add_get("/v1/models", server.models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        server.url = f"http://127.0.0.1:{port}/v1"
        started.set()
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runners.append(loop.run_until_complete(start()))
        loop.run_forever()
        loop.run_until_complete(runners[0].cleanup())

    runners: list[web.AppRunner] = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
