"""Asking a server over HTTP so that one slow, lying or dying server neither hangs a run nor costs it a sample.

Requests of a call run side by side within a bound, over pooled connections; each attempt has a time limit on the whole
exchange (a server that drips a byte now and then is cut off too), each call a deadline; answers are capped in size,
redirects are not followed, proxies of the environment are not used. An attempt is repeated after errors of transport, 429,
5xx and answers that cannot be read, never after another 4xx: that is a refusal, which would only be repeated.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Generic, TypeVar

from moteach.errors import ConfigError, MissingDependencyError, TeacherUnavailableError
from moteach.teachers.breaker import CircuitBreaker

try:
    import httpx
    import tenacity
except ImportError as missing:
    raise MissingDependencyError(
        f"expected the packages httpx and tenacity for an expert with 'url:' or rollout=vllm, got none ({missing}); "
        "pip install 'moteach[vllm]'"
    ) from missing

API_KEY = "MOTEACH_TEACHER_API_KEY"
"""Environment variable whose value is sent as bearer token to every teacher server (`vllm serve --api-key`)."""

_LONGEST_PAUSE = 16.0
T = TypeVar("T")


class RefusedError(ConfigError):
    """A request the server will not answer however often it is repeated: a 4xx or a redirect."""


class UnreadableError(Exception):
    """An answer that is damaged or about something else: worth another attempt, never worth reading."""


class _TransientError(Exception):
    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole answer of status 200."""

    body: bytes
    headers: Mapping[str, str]

    def json(self) -> dict[str, Any]:
        """Reads the body as one JSON object.

        Raises:
            UnreadableError: It is none, or cut off.
        """
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise UnreadableError(f"{len(self.body)} bytes that are not JSON ({error})") from error
        if not isinstance(value, dict):
            raise UnreadableError(f"JSON of type {type(value).__name__} in the place of an object")
        return value


@dataclass(frozen=True, kw_only=True)
class Request(Generic[T]):
    """One question: a path below the server's address, a JSON body (None: GET), and how to read the answer."""

    path: str
    body: Mapping[str, Any] | None = None
    read: Callable[[Reply], T]


@dataclass(kw_only=True)
class Counts:
    """What happened since the counts were last read."""

    requests: int = 0
    """Attempts that were sent."""
    retries: int = 0
    """Attempts beyond the first of their question."""
    failures: int = 0
    """Calls that were given up, or refused by the open breaker."""
    waits: int = 0
    """Times a call waited for a server that was down."""
    bytes: int = 0
    """Bytes of the answers' bodies."""
    seconds: float = 0.0
    """Wall-clock time inside calls."""


@dataclass(kw_only=True)
class HttpClient:
    """Asks one server.

    Args:
        name: Name of the expert, for messages, where `role` says what it is and `keys` where its settings are.
        url: Address without a trailing slash; the caller has checked its host.
        concurrency: Requests in flight at most; also the number of pooled connections.
        timeout: Seconds of one attempt, from connecting to the last byte.
        deadline: Seconds of one call with all its requests and repetitions.
        attempts: Attempts of one request at most.
        backoff: Seconds before the second attempt; doubled each time, 16 at most. A `Retry-After` of the server counts.
        max_response_bytes: Largest answer that is read.
        wait: Seconds for which a call that failed waits for the server to come back, asking only what is missing.
        breaker: Counts failed calls.
        clock: Monotonic time in seconds.
    """

    name: str
    url: str
    concurrency: int = 8
    timeout: float = 120.0
    deadline: float = 600.0
    attempts: int = 5
    backoff: float = 0.5
    max_response_bytes: int = 1 << 29
    wait: float = 0.0
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    clock: Callable[[], float] = time.monotonic
    role: str = "teacher"
    keys: str = "teachers.http"

    def __post_init__(self) -> None:
        sizes = (self.concurrency, self.attempts, self.max_response_bytes)
        if min(sizes) < 1 or not (self.timeout > 0 and self.deadline > 0 and self.backoff >= 0 and self.wait >= 0):
            raise ConfigError(
                f"{self.keys}: expected concurrency, attempts and max_response_bytes of at least 1, timeout and deadline "
                f"above 0, backoff and wait of at least 0, got {sizes}, {self.timeout}, {self.deadline}, {self.backoff} and "
                f"{self.wait}"
            )
        self.counts = Counts()
        key = os.environ.get(API_KEY, "").strip()
        self._client = httpx.AsyncClient(
            base_url=self.url.rstrip("/"),
            headers={"accept-encoding": "identity", **({"authorization": f"Bearer {key}"} if key else {})},
            timeout=httpx.Timeout(self.timeout),
            limits=httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            follow_redirects=False,
            trust_env=False,
        )
        self._slots = asyncio.Semaphore(self.concurrency)

    def lap(self) -> dict[str, float]:
        """Returns the counts since the last lap, and `breaker_open` (0 or 1), and starts over."""
        found = {**asdict(self.counts), "breaker_open": float(self.breaker.state == "open")}
        self.counts = Counts()
        return {key: float(value) for key, value in found.items()}

    def ask(self, requests: Mapping[int, Request[T]]) -> dict[int, T]:
        """Asks everything and returns all answers under the keys of their questions, or raises: never a part of them.

        Raises:
            TeacherUnavailableError: The server did not answer in time, or its breaker is open.
            RefusedError: It refused.
        """
        begin = self.clock()
        try:
            return _run(self._call(requests))
        except TeacherUnavailableError:
            self.counts.failures += 1
            raise
        finally:
            self.counts.seconds += self.clock() - begin

    async def _call(self, requests: Mapping[int, Request[T]]) -> dict[int, T]:
        answers: dict[int, T] = {}
        give_up = self.clock() + self.wait
        while True:
            try:
                if self.breaker.state == "open" and self.wait == 0:
                    raise self._unavailable(
                        f"its breaker open for {self.breaker.seconds_left:.0f} s more after failed calls in a row"
                    )
                await self._all({key: one for key, one in requests.items() if key not in answers}, answers)
            except TeacherUnavailableError:
                if not await self._back(give_up):
                    raise
                continue
            self.breaker.succeeded()
            return answers

    async def _all(self, requests: Mapping[int, Request[T]], answers: dict[int, T]) -> None:
        """One try at everything that is missing; what was answered stays in `answers` whatever happens to the rest."""
        attempts = 1 if self.breaker.state == "half_open" else self.attempts

        async def one(key: int, request: Request[T]) -> None:
            answers[key] = await self._with_retries(request, attempts)

        try:
            async with asyncio.timeout(self.deadline), asyncio.TaskGroup() as group:
                for key, request in requests.items():
                    group.create_task(one(key, request))
        except TimeoutError as error:
            self.breaker.failed()
            raise self._unavailable(f"no whole answer within the deadline of {self.deadline:g} s") from error
        except BaseExceptionGroup as failures:
            # a refusal says more than the failures beside it
            first = next((e for e in failures.exceptions if not isinstance(e, _TransientError)), failures.exceptions[0])
            if not isinstance(first, _TransientError):
                raise first from None
            self.breaker.failed()
            raise self._unavailable(f"{first} ({attempts} attempts)") from first

    async def _back(self, give_up: float) -> bool:
        """Waits until the server says it is well; False when it does not in time."""
        if self.clock() >= give_up:
            return False
        self.counts.waits += 1
        pause = max(self.backoff, 0.05)
        while True:
            await asyncio.sleep(min(pause, max(0.0, give_up - self.clock())))
            try:
                await self._attempt(Request(path="/health", read=lambda reply: None))
                return True
            except RefusedError:  # it speaks
                return True
            except _TransientError:
                if self.clock() >= give_up:
                    return False
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _with_retries(self, request: Request[T], attempts: int) -> T:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(attempts),
            retry=tenacity.retry_if_exception_type(_TransientError),
            wait=self._pause,
            before_sleep=self._count_retry,
            reraise=True,
        )
        answer: T = await retrying(self._in_slot, request)
        return answer

    async def _in_slot(self, request: Request[T]) -> T:
        async with self._slots:
            await asyncio.sleep(0)  # a failure beside it cancels this one before it is sent
            return await self._attempt(request)

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        self.counts.retries += 1

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.pause if isinstance(error, _TransientError) else 0.0
        return min(max(self.backoff * 2.0 ** (state.attempt_number - 1), asked), _LONGEST_PAUSE)

    async def _attempt(self, request: Request[T]) -> T:
        self.counts.requests += 1
        method, content = ("GET", None) if request.body is None else ("POST", json.dumps(request.body).encode())
        headers = {} if content is None else {"content-type": "application/json"}
        try:
            async with (
                asyncio.timeout(self.timeout),
                self._client.stream(method, request.path, content=content, headers=headers) as response,
            ):
                body = await self._body(response)
        except TimeoutError as error:
            raise _TransientError(f"no whole answer within {self.timeout:g} s") from error
        except httpx.TransportError as error:
            raise _TransientError(f"{type(error).__name__}: {error}") from error
        self._check_status(response, body)
        try:
            return request.read(Reply(body=body, headers=response.headers))
        except UnreadableError as error:
            raise _TransientError(f"an answer that cannot be used: {error}") from error

    async def _body(self, response: httpx.Response) -> bytes:
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > self.max_response_bytes:
                raise RefusedError(
                    f"expected an answer of at most {self.max_response_bytes} bytes from the {self.role} '{self.name}', got "
                    f"more; ask for less (support.k), or raise {self.keys}.max_response_bytes"
                )
        self.counts.bytes += len(body)
        return bytes(body)

    def _check_status(self, response: httpx.Response, body: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        said = _said(body)
        if status == 429 or status >= 500:
            raise _TransientError(f"status {status}: {said}", pause=_seconds(response.headers.get("retry-after")))
        if 300 <= status < 400:
            said = f"a redirect to {response.headers.get('location')}, which is not followed; write the final address"
        elif status in (401, 403):
            said += f"; set {API_KEY} in the environment"
        raise RefusedError(
            f"expected an answer from the {self.role} '{self.name}' at {self.url}{response.request.url.path}, got status "
            f"{status}: {said}"
        )

    def _unavailable(self, got: str) -> TeacherUnavailableError:
        return TeacherUnavailableError(
            f"expected an answer from the {self.role} '{self.name}' at {self.url}, got {got}; no row was graded in its "
            f"place. Start or repair the server, or let the run wait for it ({self.keys}.wait=3600)"
        )


def _said(body: bytes) -> str:
    """The message of an error answer, on one line."""
    text = body[:4096].decode("utf-8", errors="replace")
    try:
        value = json.loads(text)
        text = value["error"]["message"] if isinstance(value.get("error"), dict) else str(value)
    except (ValueError, KeyError, AttributeError):
        pass
    return " ".join(str(text).split())[:300] or "no message"


def _seconds(text: str | None) -> float:
    """Seconds of a `Retry-After` header; dates and nonsense count as none."""
    return float(text) if text is not None and text.isdecimal() else 0.0


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the loop of this process and waits for it; works inside a notebook's own loop too."""
    future = asyncio.run_coroutine_threadsafe(work, _loop(os.getpid()))
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@lru_cache(maxsize=1)
def _loop(pid: int) -> asyncio.AbstractEventLoop:
    """One thread for all servers, so that connections outlive a call; another process gets its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"moteach-http-{pid}", daemon=True).start()
    return loop
