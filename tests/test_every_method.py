"""Every file of ``configs/methods`` trains on the miniature, by the job that a run of a sequence gives to a worker."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cpt_rft.checkpoint import load_policy
from cpt_rft.config.engine import EngineConfig, parse_engine
from cpt_rft.config.load import REPOSITORY, load_experiment
from cpt_rft.config.methods import MethodConfig
from cpt_rft.config.schema import Experiment
from cpt_rft.sequence.job import Job, do_job, preflight
from cpt_rft.sequence.plan import Selection
from cpt_rft.sequence.rundir import Run, make_run
from tests.helpers.tree import ROOT

METHODS = sorted(path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml"))
#: The smallest numbers with which each part of a method file has something to do.
SMALL: dict[str, tuple[str, ...]] = {
    "prompts_per_step": ("4",),
    "micro_batch": ("4",),
    "epochs": ("1",),
    "group": ("4",),
    "max_new_tokens": ("24",),
    "rollout_steps": ("2",),
    "ewc": ("rows=2", "max_new_tokens=4"),
    "lwf": ("max_new_tokens=4",),
    "replay": ("rows_per_step=1",),
    "filter": ("rollouts=4",),
    "rollouts": ("samples=4",),
    "curriculum": ("rollouts=2",),
    "alternate": ("rft_steps=1",),
}
#: What the log has besides, by the key of a method file that is not null there.
FIELDS = {
    "replay": "replayed",
    "ewc": "penalty",
    "l2": "penalty",
    "lwf": "penalty",
    "hint": "shown",
    "prefix": "shown",
    "curriculum": "difficulty",
}
REWARDED = ("reward", "accuracy", "format", "truncated", "zero_variance", "reward_variance", "entropy", "rollout_gap")


def small() -> list[str]:
    """Overrides for every method file, of the keys that it has."""
    changes = [f"methods=[{', '.join(METHODS)}]"]
    for name in METHODS:
        text = (ROOT / "configs" / "methods" / f"{name}.yaml").read_text()
        keys = {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()}
        for key in sorted(keys & SMALL.keys()):
            changes += [f"methods.{name}.{key}{'.' if '=' in value else '='}{value}" for value in SMALL[key]]
    return changes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run directory with drawn rows and nothing trained."""
    directory = tmp_path_factory.mktemp("every") / "run"
    directory.mkdir()
    data = ["data.train=8", "data.dev=1", "data.test=1", "data.general=1", f"output={directory}"]
    study = load_experiment(REPOSITORY / "configs" / "experiments" / "smoke.yaml", [*small(), *data])

    def resolve(experiment: Experiment, base: Path) -> dict[str, EngineConfig]:
        return {key: parse_engine(engine) for key, engine in preflight(experiment, base).items()}

    return make_run(directory, study, resolve, lambda name: None)


def trained(run: Run, name: str) -> tuple[MethodConfig, list[Path]]:
    """A method and its stages, trained if they are not: the second only where the first leaves something for it."""
    chain = Selection(methods=(name,)).chains(run.experiment, run.directory)[0]
    method = chain.method
    if method.learns_from is not None:
        trained(run, method.learns_from)
    inherits = method.replay or method.ewc or (method.lora is not None and method.lora.orthogonality)
    stages = chain.stages if inherits or len(chain.stages) == 1 else chain.stages[:1]
    todo = tuple(stage.name for stage in stages if not stage.directory.exists())
    if todo:
        job = Job("chain", name, 0, 0, todo, evaluate=False, measure=False)
        do_job(run.directory, job, lambda event: None)
    return method, [stage.directory for stage in stages]


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_every_method_file_trains(run: Run, name: str) -> None:
    """About a second each, 40 together: one step of four rows, or two."""
    method, stages = trained(run, name)
    before = run.base.directory
    for stage in stages:
        lines = [json.loads(line) for line in (stage / "train" / "log.jsonl").read_text().splitlines()]
        assert lines and all(math.isfinite(line["loss"]) and line["tokens"] > 0 for line in lines)
        assert any(line["grad_norm"] > 0 for line in lines)
        if method.kind == "grpo":
            assert all(lines[0][field] is not None for field in REWARDED)
            assert (lines[0]["kl"] is not None) or method.kl_coef == 0
        load_policy(stage / "checkpoint")
        assert moved(before, stage / "checkpoint")
        before = run.base.directory if method.adapter_per_task else stage / "checkpoint"
    for key, field in FIELDS.items():
        if getattr(method, key, None) is not None:
            assert lines[-1][field] is not None and lines[-1][field] >= 0, field


def moved(before: Path, after: Path) -> bool:
    """Whether any weight differs."""
    one, two = (load_file(place / "model.safetensors") for place in (before, after))
    return any(not torch.equal(one[name], weight) for name, weight in two.items())
