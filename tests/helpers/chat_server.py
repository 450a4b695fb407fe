"""A server of chat completions on loopback, answered by a real checkpoint; any reply can be spoilt."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cpt_rft.checkpoint import encode_prompts, load_policy
from cpt_rft.engines.local.generate import generate


class Server(ThreadingHTTPServer):
    """Chat completions by a checkpoint, on loopback; `fault` may spoil a reply."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.policy = load_policy(checkpoint)
        self.lock, self.bodies, self.at_once, self.most = threading.Lock(), [], 0, 0
        self.fault: Callable[[int, dict[str, Any]], tuple[int, Any]] = lambda count, reply: (200, reply)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body["key"] = self.headers.get("Authorization")
        with self.server.lock:
            self.server.bodies.append(body)
            count = len(self.server.bodies)
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
        reply = _reply(self.server, body)
        status, reply = self.server.fault(count, reply)
        with self.server.lock:
            self.server.at_once -= 1
        text = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def _reply(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    [message] = body["messages"]
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    images = [base64.b64decode(p["image_url"]["url"].split(",")[1]) for p in parts if p["type"] == "image_url"]
    text = "".join(p["text"] if p["type"] == "text" else "<image>" for p in parts)
    [prompt] = encode_prompts(server.policy, [(images, text)])
    with server.lock:
        [[done]] = generate(server.policy, [prompt], max_new_tokens=body["max_tokens"], temperature=0.0)
    said = server.policy.tokenizer.decode(done.token_ids, skip_special_tokens=True)
    choice = {"index": 0, "message": {"content": said}, "finish_reason": done.finish, "token_ids": done.token_ids}
    return {"prompt_token_ids": prompt.ids.tolist(), "usage": {"prompt_tokens": len(prompt.ids)}, "choices": [choice]}


@contextmanager
def served(checkpoint: Path) -> Iterator[Server]:
    """A running server."""
    server = Server(checkpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
