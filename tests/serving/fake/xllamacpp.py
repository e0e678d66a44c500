"""Stands in for xllamacpp in tests: answers as llama.cpp's server does, or fails as $FAKE_SERVER says.

"dies" ends while loading, "hangs" never listens. $FAKE_SERVER_CHILD is a file for the process id of a child that it
starts and leaves alone, as an engine core is left alone by a server that is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace


class CommonParams:
    def __init__(self) -> None:
        self.model = SimpleNamespace(path="")
        self.sampling = SimpleNamespace(temp=0.8)
        self.hostnames: list[str] = []
        self.port = 0
        self.model_alias: set[str] = set()
        self.api_keys: list[str] = []
        self.use_jinja = False
        self.n_ctx = 0


class Server:
    def __init__(self, parameters: CommonParams) -> None:
        mode, child = os.environ.get("FAKE_SERVER"), os.environ.get("FAKE_SERVER_CHILD")
        if child:
            started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            half = Path(f"{child}.half")
            half.write_text(str(started.pid), encoding="utf-8")
            half.rename(child)
        if mode == "dies":
            sys.stderr.write("\x1b[31m0.00.005 E srv  load_model: failed to load model\x1b[0m\n")
            raise RuntimeError("Failed to init server, please check the input params.")
        if mode == "hangs":
            sys.stderr.write("still loading\n")
            time.sleep(600)
        (name,) = parameters.model_alias

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({"data": [{"id": name}], "n_ctx": parameters.n_ctx, "temp": parameters.sampling.temp})

            def answer(self, value: object) -> None:
                key = parameters.api_keys
                allowed = self.path == "/health" or not key or self.headers["Authorization"] == f"Bearer {key[0]}"
                body = json.dumps(value).encode()
                self.send_response(200 if allowed else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.http = ThreadingHTTPServer((parameters.hostnames[0], parameters.port), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.listening_address = f"http://{parameters.hostnames[0]}:{parameters.port}"
