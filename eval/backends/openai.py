"""Any server that speaks OpenAI's chat completions: several requests at once, retries, time limits."""

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cpt_rft.checkpoint import Policy, vision_token_ids
from cpt_rft.config.contracts import Decoding
from cpt_rft.data.example import IMAGE_TAG
from cpt_rft.engines.local.generate import Completion
from eval.backends import BackendError, Question, check_seen, resized

#: Answers of a server that may differ the next time.
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class OpenAi:
    """A server.

    Attributes:
        url: Where it is, with the version: ``http://localhost:8000/v1``.
        model: Name of the model there.
        key: Sent as a bearer token; empty for none.
        concurrency: Requests at once.
        retries: How often a request that failed for a passing reason is sent again.
        timeout_s: Longest wait for one answer, in seconds.
        pause_s: Wait before the first retry; twice as long before each further one.
    """

    url: str
    model: str
    key: str = ""
    concurrency: int = 16
    retries: int = 4
    timeout_s: float = 120.0
    pause_s: float = 1.0

    def answer(
        self, reader: Policy, questions: Sequence[Question], decoding: Decoding, max_new_tokens: int
    ) -> list[list[Completion]]:
        """As `eval.backends.Backend`."""
        banned = {str(token): -100 for token in vision_token_ids(reader)}
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "n": decoding.samples}
        common = {"model": self.model, "max_tokens": max_new_tokens, "logit_bias": banned, **sampling}
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda question: self._one(reader, question, common), questions))

    def _one(self, reader: Policy, question: Question, common: dict[str, Any]) -> list[Completion]:
        pictures = [resized(reader.vision, image, question.id) for image in question.images]
        content = _content(question.text, [data for data, _ in pictures])
        seed = {} if question.seed is None else {"seed": question.seed % 2**63}
        # vLLM then also says which tokens it saw and wrote; other servers leave the key alone.
        body = {**common, **seed, "messages": [{"role": "user", "content": content}], "return_token_ids": True}
        reply = self._post(question.id, body)
        try:
            seen, count = reply.get("prompt_token_ids"), reply["usage"]["prompt_tokens"]
            choices = [self._completion(reader, choice) for choice in reply["choices"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise BackendError(
                f"Row {question.id}: {self.url} sent no chat completion ({error}).", "check --url"
            ) from error
        if seen is None and count != len(question.prompt.ids):
            raise BackendError(
                f"Row {question.id}: {self.url} counts {count} prompt tokens, {len(question.prompt.ids)} were asked.",
                "serve this very checkpoint, with its own tokenizer, chat template and pixel budget",
            )
        if seen is not None:
            check_seen(question, seen, [grid for _, grid in pictures], self.url)
        return choices

    def _completion(self, reader: Policy, choice: dict[str, Any]) -> Completion:
        ids, text = choice.get("token_ids"), choice["message"]["content"] or ""
        finish = choice["finish_reason"]
        if ids is None:
            ids = reader.tokenizer.encode(text, add_special_tokens=False)
            ids += [reader.tokenizer.eos_token_id] * (finish == "stop")
        return Completion(list(ids), [], "stop" if finish == "stop" else "length")

    def _post(self, row: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                    return dict(json.load(reply))
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}: {error.read(200).decode(errors='replace').strip()}"
                if error.code not in PASSING:
                    break
            except (OSError, ValueError) as error:  # unreachable, too slow, or cut short
                problem = str(error)
            if attempt < self.retries:
                time.sleep(self.pause_s * 2**attempt)
        raise BackendError(f"Row {row}: {self.url} gave no answer ({problem}).", "check --url, --model and the server")


def _content(text: str, pictures: Sequence[bytes]) -> list[dict[str, Any]]:
    """The user's turn: text and pictures in their order."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE_TAG)):
        if number:
            address = f"data:image/png;base64,{base64.b64encode(pictures[number - 1]).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": address}})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
