"""Rollout-based instance filtering as a step of its own, before a stage trains: vLLM makes the tries where training's
own rollouts are vLLM's, on GPUs; else this process does.
"""

from collections.abc import Callable, Sequence

from cpt_rft.checkpoint import encode_prompts
from cpt_rft.config.contracts import Decoding
from cpt_rft.config.engine import EasyR1Config
from cpt_rft.data.example import Example
from cpt_rft.engines.base import Stage
from cpt_rft.engines.easyr1.machine import environment_of
from cpt_rft.engines.local.batches import stage_rows
from cpt_rft.engines.local.resume import stage_fingerprint
from cpt_rft.engines.local.rollouts import Attempt, LocalAttempt, Response, chosen_rows, source_of, tries_of
from cpt_rft.engines.local.runtime import prepare
from cpt_rft.prompts import user_text
from cpt_rft.seeds import derive_seed
from cpt_rft.vision import VisionSpec
from eval.backends import Question, reader
from eval.backends.vllm import Vllm


def try_rows(stage: Stage, progress: Callable[[int, int], None], *, keep_text: bool = False) -> None:
    """Make the tries of a stage that are not there yet; the engine finds them in its work directory.

    Args:
        stage: The stage, whose method has a filter.
        progress: Told the rows that are done, and how many there are.
        keep_text: Write down the text of every try.

    Raises:
        DataError: They leave no row to train on.
    """
    dtype, device = prepare(stage.engine)
    attempt: Attempt
    if isinstance(stage.engine, EasyR1Config) and device.startswith("cuda"):
        attempt = VllmAttempt(stage, stage.engine)
    else:
        attempt = LocalAttempt(stage, dtype, device)
    try:
        chosen_rows(
            stage, stage_rows(stage), stage_fingerprint(stage, dtype), attempt, tick=progress, keep_text=keep_text
        )
    finally:
        if isinstance(attempt, VllmAttempt):
            attempt.close()


class VllmAttempt:
    """Tries by vLLM in an environment of its own, started with the first of them.

    Args:
        stage: The stage.
        engine: Its engine, whose environment has vLLM.
    """

    def __init__(self, stage: Stage, engine: EasyR1Config) -> None:
        tries = tries_of(stage.method)
        assert tries is not None  # it is made only where there are tries
        checkpoint = source_of(stage).checkpoint
        self.stage, self.tries = stage, tries
        vision = VisionSpec.read(checkpoint).with_limits(*stage.engine.pixel_limits)
        self.reader = reader(checkpoint, vision)
        self.decoding = Decoding(temperature=tries.temperature, top_p=engine.top_p, samples=tries.number)
        python = environment_of(engine) / "bin" / "python"
        self.vllm = Vllm(checkpoint, engine.dtype, str(python), engine.tensor_parallel, self._longest())

    def __call__(self, rows: Sequence[Example]) -> list[list[Response]]:
        """The tries at each row."""
        texts = [user_text(row, self.stage.method.style, self.stage.prompt_preset) for row in rows]
        pairs = [(row.images, text) for row, text in zip(rows, texts, strict=True)]
        prompts = encode_prompts(self.reader, pairs, [row.id for row in rows])
        questions = [
            Question(row.id, text, row.images, prompt, derive_seed("instances", self.stage.seed, row.id))
            for row, text, prompt in zip(rows, texts, prompts, strict=True)
        ]
        groups = self.vllm.answer(self.reader, questions, self.decoding, self.tries.max_new_tokens)
        decode = self.reader.tokenizer.decode
        return [
            [Response(decode(each.token_ids, skip_special_tokens=True), each.finish == "stop") for each in group]
            for group in groups
        ]

    def close(self) -> None:
        """End the process."""
        self.vllm.close()

    def _longest(self) -> int | None:
        limit = self.stage.method.max_prompt_tokens
        return None if limit is None else limit + self.tries.max_new_tokens
