"""Try again where trying again can help: 429, 5xx, cut connections and truncated bodies; nothing else."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")
_STATUS = {408, 425, 429, 500, 502, 503, 504}
# Clients of the hub use httpx, httpx2 or requests by version; their transport errors share these homes.
_TRANSPORT = {"httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
_TRUNCATED = "Consistency check failed"


class Patience(NamedTuple):
    """How long to keep trying.

    Attributes:
        attempts: Calls in all.
        base_s: Pause before the second call, in seconds; it doubles each time.
        longest_s: No pause is longer, whatever a server asks for.
    """

    attempts: int = 6
    base_s: float = 1.0
    longest_s: float = 60.0


PATIENCE = Patience()


def retrying(call: Callable[[], T], patience: Patience = PATIENCE, sleep: Callable[[float], None] = time.sleep) -> T:
    """The result of ``call``, tried again after every error that may pass.

    >>> retrying(lambda: 3)
    3
    """
    for attempt in range(patience.attempts - 1):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            pause = asked_pause_s(error)
            sleep(min(patience.base_s * 2**attempt if pause is None else pause, patience.longest_s))
    return call()


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later.

    Libraries wrap what happened; the first error of the chain with an HTTP status decides.

    >>> is_transient(ConnectionResetError()), is_transient(FileNotFoundError())
    (True, False)
    """
    for cause in _chain(error):
        if type(cause).__name__ == "OfflineModeIsEnabled":
            return False
        status = getattr(getattr(cause, "response", None), "status_code", None) or getattr(cause, "code", None)
        if isinstance(status, int):
            return status in _STATUS
    return any(
        isinstance(cause, ConnectionError | TimeoutError)
        or type(cause).__module__.partition(".")[0] in _TRANSPORT
        or _TRUNCATED in str(cause)
        for cause in _chain(error)
    )


def asked_pause_s(error: BaseException) -> float | None:
    """The seconds that a server's ``Retry-After`` asks for, if it does."""
    for cause in _chain(error):
        headers = getattr(getattr(cause, "response", cause), "headers", None)
        text = headers.get("Retry-After") if headers is not None else None
        if text is not None and text.strip().isdigit():
            return float(text)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
