"""vLLM in a process of its own, with its own Python environment, spoken to by JSON lines."""

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_rft.checkpoint import Policy, vision_token_ids
from cpt_rft.config.contracts import Decoding
from cpt_rft.engines.local.generate import Completion
from eval.backends import BackendError, Question, check_seen, resized, unexpanded

WORKER = Path(__file__).with_name("vllm_worker.py")


@dataclass
class Vllm:
    """A vLLM engine that is started with the first question.

    Attributes:
        checkpoint: What it loads.
        dtype: Arithmetic.
        python: The interpreter of an environment with vLLM.
        tensor_parallel: GPUs that share the model.
        longest: Longest prompt and answer together, in tokens; none for the checkpoint's own limit.
        engine: Further arguments of ``vllm.LLM``.
    """

    checkpoint: Path
    dtype: str = "float32"
    python: str = sys.executable
    tensor_parallel: int = 1
    longest: int | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    _process: subprocess.Popen[str] | None = None
    _log: Any = None

    def answer(
        self, reader: Policy, questions: Sequence[Question], decoding: Decoding, max_new_tokens: int
    ) -> list[list[Completion]]:
        """As `eval.backends.Backend`."""
        if self._process is None:
            self._start(reader)
        pictures = [[resized(reader.vision, image, q.id) for image in q.images] for q in questions]
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "n": decoding.samples}
        batch = {
            "sampling": {**sampling, "max_tokens": max_new_tokens},
            "banned": vision_token_ids(reader),
            "questions": [
                {
                    "ids": unexpanded(reader, question.prompt),
                    "pictures": [base64.b64encode(data).decode() for data, _ in found],
                    "seed": None if question.seed is None else question.seed % 2**63,
                }
                for question, found in zip(questions, pictures, strict=True)
            ],
        }
        answers = self._ask(batch)
        for question, found, answer in zip(questions, pictures, answers, strict=True):
            check_seen(question, answer["prompt"], [grid for _, grid in found], "vLLM")
        return [
            [Completion(ids, [], "stop" if reason == "stop" else "length") for ids, reason in answer["samples"]]
            for answer in answers
        ]

    def _start(self, reader: Policy) -> None:
        engine = {
            "model": str(self.checkpoint.resolve()),
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel,
            "mm_processor_kwargs": reader.vision.vllm(),
            "limit_mm_per_prompt": {"image": 8, "video": 0},
            "generation_config": "vllm",  # what the contract does not say must not come from a file
            "seed": 0,
            **({} if self.longest is None else {"max_model_len": self.longest}),
            **self.engine,
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        # One process, so that it ends with us; no word to anybody's server.
        quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [self.python, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **quiet},
        )
        self._ask({"engine": engine})

    def _ask(self, message: dict[str, Any]) -> Any:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise AssertionError("started before it is asked")
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            said = [text for text in self._log.read().splitlines() if text.strip()] or ["it said nothing"]
            raise BackendError(f"vLLM ended: {said[-1]}", "name an interpreter that has vLLM with --engine-python")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
