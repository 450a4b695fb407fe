"""What can go wrong between a hub and its client, on request."""

import re
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["status", "cut", "slow", "corrupt", "misplaced"]


@dataclass
class Fault:
    """A request whose path matches fails in one way, a number of times.

    Attributes:
        path: Regular expression searched in the path of the request.
        kind: ``status`` answers ``status``; ``cut`` ends the body after ``at`` bytes; ``slow`` sends it in pieces
            with pauses of ``pause_s``; ``corrupt`` changes the byte at ``at``; ``misplaced`` answers a range with
            one that begins at the first byte.
        times: How often; -1 for ever.
        method: Only requests with this method.
    """

    path: str
    kind: Kind
    times: int = 1
    method: str = "GET"
    status: int = 503
    at: int = 0
    pause_s: float = 0.0
    retry_after: str | None = None
    seen: int = field(default=0, init=False)

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it."""
        if self.times == self.seen or method != self.method or not re.search(self.path, path):
            return False
        self.seen += 1
        return True
