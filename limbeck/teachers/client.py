"""Talking to a server: JSON over HTTP, several requests at once, and again where that may help.

It stands on the standard library: one kind of request, with no streams, no cookies and no redirects (which would
carry the key to another host), needs no more.
"""

from __future__ import annotations

import http.client
import json
import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

Key = str | Callable[[], str] | None
Read = TypeVar("Read")

FIRST_WAIT, LONGEST_WAIT, MOST_PATIENCE = 0.5, 30.0, 600.0
"""Seconds: before the second attempt, before any, and what a server may ask for by Retry-After."""

TIMED_OUT, TOO_MANY = 408, 429
SHOWN = 300


class ReplyError(Exception):
    """A reply is not what was asked for; the message says what is wrong with it."""


class AttemptError(Exception):
    """An attempt failed in a way that may pass.

    Attributes:
        after: Seconds that the server asks to wait.
    """

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class Client:
    """Posts JSON to one server.

    An attempt that fails in a way that may pass (no connection, no answer in time, status 408, 429 or 5xx) is made
    again, after 0.5, 1, 2, ... up to 30 seconds, less a random part so that many clients do not come back at once;
    or after what the server asks for by Retry-After. Other failures are errors at once.

    Args:
        url: Where the server is, ``http://host:port``, with or without the ``/v1`` at its end.
        api_key: Sent as bearer token; or a function that gives it, asked for each request. No message shows it.
        timeout: Seconds for a connection to come about, and without a byte of the answer.
        attempts: How often a request is made before it is given up.
        workers: Requests at once.
        sleep: Waits for some seconds; another function than the clock's is for tests.

    Raises:
        ValueError: the url is none of http or https, or holds a password, a query or white space.

    Example:
        >>> Client("http://127.0.0.1:8000/v1/").address
        'http://127.0.0.1:8000'
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: Key = None,
        timeout: float = 120.0,
        attempts: int = 6,
        workers: int = 4,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        if attempts < 1 or workers < 1 or not timeout > 0:
            raise ValueError(
                f"attempts={attempts}, workers={workers} and timeout={timeout:g} must all be positive; "
                "leave out what you do not need to change"
            )
        self._host, self._port, self._secure, self._path = _parts(url)
        self.address = f"{'https' if self._secure else 'http'}://{self._host}:{self._port}{self._path}"
        self.timeout, self.attempts, self.workers = timeout, attempts, workers
        self._api_key = api_key
        self._sleep = sleep
        self._random = random.Random()  # not the global one, which a training may depend on

    def post_all(
        self, path: str, bodies: Sequence[Any], read: Callable[[int, dict[str, Any]], Read]
    ) -> list[Read]:
        """Post several bodies, some at once.

        Args:
            path: Where to, such as ``/v1/completions``.
            bodies: What JSON can hold.
            read: Is given the place of a body and the reply, in the thread that made the request, as soon as it is
                there; raises `ReplyError` where the reply is not what was asked for.

        Returns:
            What `read` made of the replies, in the order of the bodies.

        Raises:
            ConnectionError: the server could not be reached, or not be made to answer, in all attempts.
            ValueError: it refused a request, or answered nonsense.
        """
        over = threading.Event()
        with ThreadPoolExecutor(min(self.workers, max(1, len(bodies)))) as pool:
            asked = [pool.submit(self._asked, path, b, place, read, over) for place, b in enumerate(bodies)]
            try:
                for future in wait(asked, return_when=FIRST_EXCEPTION).done:
                    future.result()
                return [future.result() for future in asked]
            finally:  # after an error, nobody waits for the others to try again
                over.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _asked(
        self,
        path: str,
        body: Any,
        place: int,
        read: Callable[[int, dict[str, Any]], Read],
        over: threading.Event,
    ) -> Read:
        key = self._key()
        answer = self._post(path, json.dumps(body).encode(), key, over)
        try:
            return read(place, _parsed(answer))
        except ReplyError as what:
            raise ValueError(
                f"{self.address}{path} answered nonsense: {_shown(str(what), key)}; check that it is an "
                "OpenAI-compatible or vLLM server, and that the model and the settings are those it serves"
            ) from None

    def _post(self, path: str, body: bytes, key: str, over: threading.Event) -> bytes:
        """Make attempts until one succeeds, or until others have failed for good."""
        sleep = self._sleep or over.wait
        waited, why = 0.0, ""
        for attempt in range(self.attempts):
            try:
                return self._attempt(path, body, key)
            except AttemptError as failure:
                why = str(failure)
                pause = max(self._pause(attempt), failure.after)
                if attempt + 1 == self.attempts or pause > MOST_PATIENCE:
                    break
                sleep(pause)
                waited += pause
                if over.is_set():
                    break
        times = "1 attempt" if attempt == 0 else f"{attempt + 1} attempts and {waited:.1f} s of waiting"
        raise ConnectionError(
            f"{self.address}{path} {why}, given up after {times}; see that the server runs and can be reached "
            "from here, then start again"
        )

    def _pause(self, attempt: int) -> float:
        return min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt) * self._random.uniform(0.5, 1.0)

    def _attempt(self, path: str, body: bytes, key: str) -> bytes:
        status, after, answer = self._exchange(path, body, key)
        if status == 200:
            return answer
        said = _shown(_message(answer), key)
        if status in (TIMED_OUT, TOO_MANY) or status >= 500:
            asks = f" and asks to wait {after:.0f} s" if after > MOST_PATIENCE else ""
            raise AttemptError(f"answered with status {status}{said and ': '}{said}{asks}", after)
        raise ValueError(
            f"{self.address}{path} refused the request with status {status}: {said or 'it does not say why'}; "
            "change the url, the model's name, the api_key or the settings, and start again"
        )

    def _exchange(self, path: str, body: bytes, key: str) -> tuple[int, float, bytes]:
        """One request on a connection of its own: the status, the seconds to wait and the answer's body."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        try:
            connection.request("POST", self._path + path, body, headers)
            reply = connection.getresponse()
            return reply.status, _seconds(reply.getheader("Retry-After")), reply.read()
        except ssl.SSLCertVerificationError as error:
            raise ConnectionError(
                f"{self.address} shows a certificate that cannot be trusted ({error.verify_message}); "
                "check the host's name and the certificates that this machine trusts"
            ) from None
        except TimeoutError:
            raise AttemptError(f"gave no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            said = error.strerror if isinstance(error, OSError) else None
            raise AttemptError(f"cannot be reached ({said or type(error).__name__})") from None
        finally:
            connection.close()

    def _key(self) -> str:
        given = self._api_key() if callable(self._api_key) else self._api_key
        key = "" if given is None else given.strip()
        if not (key.isascii() and key.isprintable()):  # http.client would show it in its own error
            raise ValueError("the api_key holds line breaks or characters outside ASCII; give the bare key")
        return key


def _parsed(answer: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(answer)
    except (ValueError, RecursionError):
        start = answer[:80].decode("utf-8", "replace")
        raise ReplyError(f"no JSON but {start!r}") from None
    if not isinstance(reply, dict):
        raise ReplyError(f"a {type(reply).__name__} where an object should be")
    return reply


def _shown(text: str, key: str) -> str:
    """A server's words, on one line, not all of a long text, and without the key if the server repeats that."""
    text = " ".join((text.replace(key, "***") if key else text).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _parts(url: str) -> tuple[str, int, bool, str]:
    """Host, port, whether it is https, and the path before ``/v1``."""
    try:
        found = urlsplit(url)
        host, port = found.hostname, found.port
    except ValueError:
        raise ValueError("the url of the server cannot be read; write it as http://host:port") from None
    if found.username is not None or found.password is not None or found.query or found.fragment:
        raise ValueError(
            "the url of the server holds a user's name, a password or a query, which would show in messages; "
            "give http://host:port alone, and the secret as api_key"
        )
    if found.scheme not in ("http", "https") or not host or any(c.isspace() or not c.isprintable() for c in url):
        raise ValueError(f"{url!r} is no address of a server; write it as http://host:port")
    secure = found.scheme == "https"
    return host, port or (443 if secure else 80), secure, found.path.rstrip("/").removesuffix("/v1")


def _seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks for, as seconds from now; 0 where it asks for nothing that can be read.

    Example:
        >>> _seconds("7"), _seconds(None), _seconds("soon"), _seconds("Wed, 21 Oct 2015 07:28:00 GMT")
        (7.0, 0.0, 0.0, 0.0)
    """
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if seconds > 0 else 0.0  # a NaN is not


def _message(answer: bytes) -> str:
    """What a server says of an error: OpenAI's, vLLM's or FastAPI's field for it, or else the text.

    Example:
        >>> _message(b'{"error": {"message": "no such model"}}'), _message(b"busy")
        ('no such model', 'busy')
    """
    text = answer.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)
