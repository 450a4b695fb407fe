"""Stage -> native files -> the framework's trainer on Ray -> guarded merge -> checked checkpoint."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cpt_rft.config.engine import EasyR1Config
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.engines.base import ARTEFACTS_NAME, Stage, StepLog
from cpt_rft.engines.easyr1 import rules
from cpt_rft.engines.easyr1.cluster import check_cluster
from cpt_rft.engines.easyr1.failures import explain
from cpt_rft.engines.easyr1.machine import NAME, environment_of
from cpt_rft.engines.easyr1.merge import merge
from cpt_rft.engines.easyr1.methods import supported_method
from cpt_rft.engines.easyr1.native import DATA, OUT, Files, command, deciding, fixes, settings, world, write_native
from cpt_rft.engines.easyr1.resume import LOGS, RECORDS, archive_logs, kept_lines, open_out
from cpt_rft.engines.easyr1.rows import CANARY, TRAIN, WrittenRows, write_rows
from cpt_rft.engines.easyr1.watch import FRAMEWORK_LOG, Follower, Heartbeat, check_start
from cpt_rft.engines.environment import environment_variables
from cpt_rft.engines.handover import assemble, sing, start_checkpoint
from cpt_rft.engines.local.batches import stage_rows
from cpt_rft.engines.local.resume import stage_fingerprint
from cpt_rft.engines.local.rollouts import LocalAttempt, chosen_rows, clear_rollouts, leave_rollouts
from cpt_rft.engines.outside import end_leftovers, running, said_since, size_of, status_within
from cpt_rft.errors import TrainingError
from cpt_rft.files import sha256_file
from cpt_rft.seeds import derive_seed
from cpt_rft.vision import VisionSpec

ROUNDED = "rounded.jsonl"
_POLL_S = 0.5
_SEEDS = 2**31  # what the framework and vLLM take


class EasyR1Engine:
    """Trains by EasyR1's own trainer."""

    def train(self, stage: Stage, report: Callable[[StepLog], None]) -> None:
        """See `cpt_rft.engines.base.Engine.train`. Resumed, it goes on from the framework's own checkpoint."""
        assert isinstance(stage.engine, EasyR1Config)
        engine, method = stage.engine, supported_method(stage.method)
        environment = environment_of(engine)
        directory = (stage.directory / NAME).absolute()
        directory.mkdir(exist_ok=True)
        end_leftovers(directory)
        spec = VisionSpec.read(stage.parent).with_limits(*engine.pixel_limits)
        start = start_checkpoint(stage.parent, spec, directory / "start").absolute()
        dtype: torch.dtype = getattr(torch, engine.dtype)
        attempt = LocalAttempt(stage, dtype, engine.device)  # for tries that `cpt-rft filter` has not made
        chosen = chosen_rows(stage, stage_rows(stage), stage_fingerprint(stage, dtype), attempt)
        written = write_rows(stage, method, chosen, start, spec, directory / DATA)
        run = _Run(directory, engine, method, environment, written)
        seed = derive_seed(*stage.seed_path, NAME) % _SEEDS

        def told(resume: Path | None) -> dict[str, object]:
            return settings(engine, method, run.files(start), spec, seed, resume)

        mended = fixes(engine, method, stage.base, directory / ROUNDED)
        told_once = {**deciding(told(None), mended), "rows": sha256_file(directory / DATA / TRAIN)}
        step = open_out(directory / OUT, told_once, world(engine))
        lines = kept_lines(directory / LOGS, step, written.rollouts, method)
        log = stage.directory / "train" / "log.jsonl"
        log.parent.mkdir(exist_ok=True)
        log.write_text("".join(line.line() + "\n" for line in lines), encoding="utf-8")
        if step < written.rollouts:
            check_cluster(engine, environment)
            keys = told(directory / OUT / f"global_step_{step}" if step else None)
            rules.check(keys, written.rollouts * method.prompts_per_step * method.rollout_steps)
            write_native(directory, keys, mended, engine, environment)
            run.follow(step, report, log)
        self._hand_over(stage, run, start)

    def _hand_over(self, stage: Stage, run: "_Run", start: Path) -> None:
        """Make the checkpoint from the framework's last one, and leave only what a reader wants."""
        directory, engine = run.directory, run.engine
        archive_logs(directory / OUT)
        actor = directory / OUT / f"global_step_{run.written.rollouts}" / "actor"
        weights = merge(run.environment, actor, world(engine), start, run.log)
        checkpoint = stage.directory / "checkpoint"
        assemble(weights, start, checkpoint)
        sing("EasyR1", run.environment, checkpoint, directory / DATA / CANARY, directory)
        leave_rollouts(stage, stage.directory / ARTEFACTS_NAME)
        clear_rollouts(stage)
        for name in (OUT, "start"):
            shutil.rmtree(directory / name, ignore_errors=True)


@dataclass(frozen=True)
class _Run:
    """One stage in the framework's hands."""

    directory: Path
    engine: EasyR1Config
    method: GrpoMethod
    environment: Path
    written: WrittenRows

    @property
    def log(self) -> Path:
        """All that the framework prints."""
        return self.directory / "framework.log"

    def files(self, start: Path) -> Files:
        """What the framework's YAML names."""
        return Files.of(self.directory, start)

    def follow(self, step: int, report: Callable[[StepLog], None], ours: Path) -> None:
        """Run it to its end; every rollout is reported and logged as it is seen.

        Raises:
            UserError: It failed, hangs, or does something else than it was told.
        """
        said = size_of(self.log)
        follower = Follower(self.directory / OUT, self.written, self.method, step)
        heartbeat = Heartbeat(self.log, self.directory / OUT / FRAMEWORK_LOG, self.directory / RECORDS)
        started = False
        variables = environment_variables(self.environment)
        with (
            running(command(self.engine, self.directory), self.directory, variables, self.log) as process,
            ours.open("a", encoding="utf-8") as file,
        ):
            while True:
                ended = status_within(process, _POLL_S)
                started = started or check_start(said_since(self.log, said), self.written)
                for line in follower.new_steps():
                    file.write(line.line() + "\n")
                    file.flush()
                    report(line)
                if ended is not None:
                    break
                heartbeat.check(self.log)
        if ended:
            raise explain(ended, said_since(self.log, said), self.log)
        if follower.step != self.written.rollouts:
            raise TrainingError(
                f"EasyR1 ended after {follower.step} of {self.written.rollouts} rollouts without an error.",
                f"see {self.log}",
            )
