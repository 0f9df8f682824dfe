"""A server that writes completions in vLLM 0.32's wire format with a tiny model of its own, and takes weights from a folder."""

from __future__ import annotations

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moteach.rollouts.sampling import truncate


class FakeRollouts:
    """Use it as a context manager. `loading` says what a request to load weights does: load, keep, half, fail, down."""

    def __init__(self, model: Any, *, name: str = "student", raw: bool = False, max_model_len: int = 64) -> None:
        self.model = copy.deepcopy(model)
        self.name, self.raw, self.max_model_len = name, raw, max_model_len
        self.loading = "load"
        self.dev_mode = True
        self.paused = False
        self.weight_version = "default"
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.folders: list[Path] = []
        self.files: list[Path] = []
        self.spoil: Any = None
        self.release: threading.Event | None = None
        self.waiting = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> FakeRollouts:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.server.handle_error = lambda *ignored: None  # type: ignore[method-assign]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        return self

    def __exit__(self, *ignored: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def completions(self) -> list[dict[str, Any]]:
        return [body for path, body in self.requests if path == "/v1/completions" and "seed" in body]

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.requests.append((path, body))
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name, "max_model_len": self.max_model_len}]}
        if path == "/v1/completions":
            if self.paused:
                return 503, {"error": {"message": "paused"}}
            if self.release is not None:
                self.waiting.set()
                self.release.wait(30)
            with self.lock:
                made = self.score(body) if "prompt_logprobs" in body else self.write(body)
            return 200, made if self.spoil is None or "seed" not in body else self.spoil(made)
        if not self.dev_mode:
            return 404, {"error": {"message": "Not Found"}}
        if self.loading == "down":
            return 500, {"error": {"message": "out of memory"}}
        return 200, self.control(path, body)

    def control(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc":
            assert body["method"] == "moteach_load"
            return {"results": [self.load(Path(body["args"][0]))]}
        if path == "/update_weight_version":
            self.weight_version = body["new_version"]
        elif path == "/weight_info":
            return {"weight_version": self.weight_version}
        elif path.startswith("/get_world_size"):
            return {"world_size": 2}
        elif path.startswith("/pause"):
            self.paused = True
        elif path == "/resume":
            self.paused = False
        return {"success": True}

    def load(self, folder: Path) -> Any:
        self.folders.append(folder)
        self.files = sorted(folder.glob("*.safetensors"))
        tensors = {name: value for file in self.files for name, value in load_file(file).items()}
        if self.loading == "fail":
            return None
        if self.loading == "half":
            tensors = {name: value for name, value in tensors.items() if "embed" not in name}
        if self.loading != "keep":
            self.model.load_state_dict(tensors, strict=False)
        return {"tensors": len(tensors)}

    def score(self, body: dict[str, Any]) -> Any:
        ids = body["prompt"]
        table = self.logits(ids).log_softmax(-1)
        entries = [{str(token): {"logprob": float(table[at, token])}} for at, token in enumerate(ids[1:])]
        return self._reply({"prompt_token_ids": ids, "prompt_logprobs": [None, *entries]})

    def write(self, body: dict[str, Any]) -> Any:
        ids, made, logprobs, reason = list(body["prompt"]), [], [], "length"
        generator = torch.Generator().manual_seed(body["seed"])
        while len(made) < body["max_tokens"] and reason == "length":
            raw = self.logits(ids + made)[-1:]
            cut = raw
            if body["temperature"] > 0:
                cut = truncate(raw / body["temperature"], top_k=body["top_k"], top_p=body["top_p"])
                token = int(torch.multinomial(cut[0].softmax(-1), 1, generator=generator))
            else:
                token = int(raw.argmax())
            made.append(token)
            logprobs.append(float((raw if self.raw else cut).log_softmax(-1)[0, token]))
            reason = "stop" if token in body["stop_token_ids"] else "length"
        said = {"token_ids": made, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}
        return self._reply({"prompt_token_ids": body["prompt"], **said})

    def _reply(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.name, "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeRollouts
    protocol_version = "HTTP/1.1"

    def log_message(self, *ignored: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(*self.fake.answer(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        self._send(*self.fake.answer(self.path, body))

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
