"""A server that speaks vLLM 0.32's wire format, scores with a tiny model, and fails in the ways servers do, on request."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from moteach.catalogue.modeling import body_and_head, hidden_states
from moteach.testing import tiny_tokenizer

SCORING = ("/v1/completions", "/inference/v1/generate", "/pooling")


class FakeVLLM:
    """Use it as a context manager; `faults` are consumed by scoring requests, first come first served."""

    def __init__(
        self,
        model: Any,
        *,
        name: str = "one",
        pooling: bool = False,
        exact: bool = True,
        max_logprobs: int = 64,
        max_model_len: int = 256,
        normalised: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.model, self.name, self.pooling, self.exact = model, name, pooling, exact
        self.max_logprobs, self.max_model_len, self.normalised = max_logprobs, max_model_len, normalised
        self.tokenizer = tokenizer or tiny_tokenizer()
        self.faults: list[str] = []
        self.always: str | None = None
        self.scored: list[tuple[int, ...]] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.in_flight = self.most_in_flight = 0
        self.delay = 0.0
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    def __enter__(self) -> FakeVLLM:
        handler = type("Handler", (_Handler,), {"fake": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.server.handle_error = lambda *ignored: None  # type: ignore[method-assign]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        return self

    def __exit__(self, *ignored: object) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def fault(self) -> str | None:
        with self.lock:
            return self.always or (self.faults.pop(0) if self.faults else None)

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)

    def completion(self, body: dict[str, Any]) -> Any:
        ids, k = body["prompt"], body["prompt_logprobs"]
        if self.pooling:
            raise RefusalError(404, "Not Found")
        if k > self.max_logprobs:
            raise RefusalError(400, f"Requested prompt logprobs of {k}, which is greater than max allowed")
        self._check(body, ids, room=1)
        table: list[Any] = [None]
        logprobs = self.logprobs(ids)
        for position in range(1, len(ids)):
            row = logprobs[position - 1]
            order = [ids[position], *(i for i in row.topk(k).indices.tolist() if i != ids[position])] if k else []
            table.append(
                {
                    str(i): {"logprob": float(row[i]), "rank": int((row > row[i]).sum()) + 1, "decoded_token": "?"}
                    for i in (order or [ids[position]])
                }
            )
        choice = {"index": 0, "text": "x", "prompt_logprobs": table, "prompt_token_ids": ids, "token_ids": [3]}
        return {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": [choice]}

    def generate(self, body: dict[str, Any]) -> Any:
        ids, parameters = body["token_ids"], body["sampling_params"]
        if self.pooling:
            raise RefusalError(404, "Not Found")
        if not self.exact:
            raise RefusalError(
                400, "prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1)."
            )
        self._check(body, ids, room=1)
        wanted, start = parameters["prompt_logprob_token_ids"], parameters["prompt_logprob_start"]
        if len(wanted) != len(ids) - 1 - start:
            raise RefusalError(400, f"{len(wanted)} rows for {len(ids) - 1 - start} scored rows")
        width = max(len(row) for row in wanted)
        scores = np.full((len(wanted), width), -np.inf, dtype=np.float32)
        logprobs = self.logprobs(ids)
        for index, row in enumerate(wanted):
            scores[index, : len(row)] = logprobs[start + index, row].numpy()
        file = io.BytesIO()
        np.save(file, scores)
        said = base64.b64encode(file.getvalue()).decode()
        return {"model": self.name, "prompt_token_id_logprobs": said, "prompt_token_ids": ids, "choices": []}

    @torch.no_grad()
    def pool(self, body: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        (ids,) = body["input"]
        if not self.pooling:
            raise RefusalError(404, "Not Found")
        self._check(body, ids, room=0)
        assert body["task"] == "token_embed"
        trunk, _ = body_and_head(self.model)
        tokens = torch.tensor([ids])
        states = hidden_states(trunk, tokens)[0]
        if body["use_activation"] or self.normalised:
            states = torch.nn.functional.normalize(states, dim=1)
        states = states.to(torch.bfloat16) if body["embed_dtype"] == "bfloat16" else states
        raw = states.contiguous().view(torch.uint8).numpy().tobytes()
        item = {
            "index": 0,
            "embed_dtype": body["embed_dtype"],
            "start": 0,
            "end": len(raw),
            "shape": list(states.shape),
        }
        return raw, {"metadata": json.dumps({"id": "pooling-1", "model": self.name, "data": [item]})}

    def _check(self, body: dict[str, Any], ids: list[int], *, room: int) -> None:
        if body.get("model") != self.name:
            raise RefusalError(404, f"The model `{body.get('model')}` does not exist. Valid aliases: {self.name}.")
        if len(ids) + room > self.max_model_len:
            raise RefusalError(400, "longer than the maximum model length")
        self.scored.append(tuple(ids))


class RefusalError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVLLM
    protocol_version = "HTTP/1.1"

    def log_message(self, *ignored: object) -> None:
        pass

    def do_GET(self) -> None:
        self.fake.seen.append((self.path, dict(self.headers)))
        if self.path == "/health":
            self.send(503 if self.fake.always else 200, b"")
        elif self.path == "/v1/models":
            self.reply({"data": [{"id": self.fake.name, "max_model_len": self.fake.max_model_len}]})
        else:
            self.reply({"error": {"message": "Not Found"}}, 404)

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fake.seen.append((self.path, dict(self.headers)))
        if self.path == "/detokenize":
            self.reply({"prompt": fake.tokenizer.decode(body["tokens"])})
            return
        fault = fake.fault() if self.path in SCORING else None
        if fault is not None and (early := getattr(self, f"fault_{fault}", None)) is not None:
            early()
            return
        with fake.lock:
            fake.in_flight += 1
            fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
        try:
            time.sleep(fake.delay)
            self.score(body, fault)
        except RefusalError as refusal:
            self.reply({"error": {"message": str(refusal), "code": refusal.status}}, refusal.status)
        finally:
            with fake.lock:
                fake.in_flight -= 1

    def score(self, body: dict[str, Any], fault: str | None) -> None:
        if self.path == "/pooling":
            raw, headers = self.fake.pool(body)
            raw, headers = SPOILED_STATES.get(fault or "", lambda raw, headers: (raw, headers))(raw, headers)
            self.send(200, raw, headers)
            return
        answer = self.fake.completion(body) if self.path == "/v1/completions" else self.fake.generate(body)
        spoil = SPOILED.get(fault or "")
        data = json.dumps(answer if spoil is None else spoil(answer)).encode()
        self.send(200, data[: len(data) // 2] if fault == "truncated_json" else data)

    def reply(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"content-type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fault_timeout(self) -> None:
        self.fake.stopping.wait(30)
        self.close_connection = True

    def fault_slow_loris(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "100000")
        self.end_headers()
        self.drip(b"x")

    def fault_slow_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
        self.drip(b"x")

    def drip(self, piece: bytes) -> None:
        self.close_connection = True
        try:
            while not self.fake.stopping.wait(0.05):
                self.wfile.write(piece)
                self.wfile.flush()
        except OSError:
            pass

    def fault_429(self) -> None:
        self.send(429, b'{"error":{"message":"busy"}}', {"retry-after": "0"})

    def fault_500(self) -> None:
        self.send(500, b"Internal Server Error")

    def fault_503(self) -> None:
        self.send(503, b'{"error":{"message":"paused"}}')

    def fault_reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def fault_closed(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def fault_cut(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "1000")
        self.end_headers()
        self.wfile.write(b'{"model": ')
        self.close_connection = True

    def fault_redirect(self) -> None:
        self.send(302, b"", {"location": "http://127.0.0.1:9/v1/completions"})

    def fault_401(self) -> None:
        self.send(401, b'{"error":"Unauthorized"}')

    def fault_huge(self) -> None:
        self.send(200, b" " * 300_000)


def _choice(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], Any]:
    def spoil(answer: Any) -> Any:
        change(answer["choices"][0])
        return answer

    return spoil


def _last(value: float | None) -> Callable[[dict[str, Any]], object]:
    def change(choice: dict[str, Any]) -> None:
        table = choice["prompt_logprobs"]
        key = next(iter(table[-1]))
        table[-1][key] = {**table[-1][key], "logprob": value}

    return change


def _renamed(choice: dict[str, Any], shift: int) -> None:
    written = str(choice["prompt_token_ids"][-1])
    table = choice["prompt_logprobs"]
    table[-1] = {key if key == written else str(int(key) + shift): value for key, value in table[-1].items()}


def _mistaken(choice: dict[str, Any]) -> None:
    written = str(choice["prompt_token_ids"][-1])
    choice["prompt_logprobs"][-1] = {"0" if written != "0" else "1": choice["prompt_logprobs"][-1][written]}


SPOILED: dict[str, Callable[[Any], Any]] = {
    "wrong_length": _choice(lambda choice: choice["prompt_logprobs"].pop()),
    "wrong_ids": _choice(lambda choice: choice.update(prompt_token_ids=choice["prompt_token_ids"][::-1])),
    "wrong_token": _choice(_mistaken),
    "no_choice": lambda answer: {**answer, "choices": []},
    "list": lambda answer: [answer],
    "nan": _choice(_last(float("nan"))),
    "null": _choice(_last(None)),
    "minus_infinity": _choice(_last(float("-inf"))),
    "clamped": _choice(_last(-9999.0)),
    "logits": _choice(_last(7.5)),
    "other_vocabulary": _choice(lambda choice: _renamed(choice, 1000)),
    "other_model": lambda answer: {**answer, "model": "impostor"},
    "wrong_ids_of_exact": lambda answer: {**answer, "prompt_token_ids": answer["prompt_token_ids"][::-1]},
    "bad_npy": lambda answer: {**answer, "prompt_token_id_logprobs": "AAAA"},
}

SPOILED_STATES: dict[str, Callable[[bytes, dict[str, str]], tuple[bytes, dict[str, str]]]] = {
    "cut_states": lambda raw, headers: (raw[:-4], headers),
    "no_metadata": lambda raw, headers: (raw, {}),
    "nan_states": lambda raw, headers: (np.full(len(raw) // 4, np.nan, dtype=np.float32).tobytes(), headers),
    "other_model": lambda raw, headers: (raw, {"metadata": headers["metadata"].replace('"one"', '"impostor"')}),
}
