"""Plan, lineage, what is skipped and what is refused, and that a run is a function of its seeds."""

import json
import shutil
from pathlib import Path

import pytest

from cpt_rft.config.load import dump, load_experiment
from cpt_rft.errors import ConfigError
from cpt_rft.manifest import Manifest, read_manifest, write_manifest
from cpt_rft.sequence import plan as planning
from cpt_rft.sequence.job import Job, Meter, do_job
from cpt_rft.sequence.lineage import survey
from cpt_rft.sequence.plan import Selection, describe, disk_bytes, evaluation_cost, training_cost
from cpt_rft.sequence.pool import worker_count
from cpt_rft.sequence.run import Session, run_experiment
from cpt_rft.sequence.rundir import Run, read_config, read_run
from cpt_rft.sequence.stages import BEGUN_NAME, train_stage
from tests.helpers.tiny_run import Tiny, content, prepared, reference

MINIATURE = Path("miniature")


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Tiny:
    """Prepared, nothing trained."""
    return prepared(tmp_path_factory.getbasetemp()).copy(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Complete; only to be looked at."""
    return reference(tmp_path_factory.getbasetemp())


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Tiny:
    """Complete, to be spoiled."""
    return reference(tmp_path_factory.getbasetemp()).copy(tmp_path)


class Here:
    """Does jobs in this process, and remembers which."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.jobs: list[Job] = []

    def run(self, jobs, workers, display) -> None:
        self.jobs += jobs
        for job in jobs:
            do_job(self.directory, job, lambda event: None)


def session(tiny: Tiny, *overrides: str) -> Session:
    asked = tiny.experiment(*overrides)
    return Session(read_run(tiny.directory, asked), asked, Here(tiny.directory), lambda text: None)


# --- plan ---


def test_the_plan_of_the_miniature():
    study = load_experiment(MINIATURE, ["seeds=[0,1]"])
    chains = Selection().chains(study, Path("runs"))
    assert [chain.label for chain in chains] == [f"{m} seed{s}" for m in ("multitask", "sft", "grpo") for s in (0, 1)]
    joint, sft = chains[0], chains[2]
    assert [stage.name for stage in joint.stages] == ["multitask"]
    assert joint.stages[0].tasks == study.tasks
    assert joint.stages[0].directory == Path("runs/multitask/order0/seed0/1_multitask")
    assert [stage.directory.name for stage in sft.stages][:2] == ["1_mini_scienceqa", "2_mini_textvqa"]
    assert sft.stages[6].partial == Path("runs/sft/order0/seed0/7_mini_superclevr.partial")
    rows, step = study.data.train, sft.method.prompts_per_step
    assert training_cost(study, sft.method, sft.stages[0]).steps == sft.method.epochs * rows // step
    assert training_cost(study, joint.method, joint.stages[0]).steps == joint.method.epochs * 7 * rows // step


def test_orders_multiply_chains_but_not_joint_ones():
    order = (
        "orders=[[mini_gqa, mini_scienceqa, mini_textvqa, mini_vizwiz, mini_geometry3k, mini_pathvqa, mini_superclevr]]"
    )
    study = load_experiment(MINIATURE, [order])
    chains = Selection().chains(study, Path("runs"))
    assert [chain.label for chain in chains] == [
        "multitask seed0", "sft seed0", "sft order1 seed0", "grpo seed0", "grpo order1 seed0",
    ]  # fmt: skip
    assert chains[2].stages[0].name == "mini_gqa"


def test_a_selection_is_of_what_there_is():
    study = load_experiment(MINIATURE, ["seeds=[0,3]"])
    assert [c.label for c in Selection(methods=("sft",), seeds=(3,)).chains(study, Path())] == ["sft seed3"]
    for selection, words in (
        (Selection(methods=("stf",)), "unknown method 'stf', the nearest is 'sft'"),
        (Selection(seeds=(2,)), "unknown seed 2"),
        (Selection(orders=(1,)), "unknown order 1"),
        (Selection(task="mini_gqua"), "unknown task 'mini_gqua', the nearest is 'mini_gqa'"),
    ):
        with pytest.raises(ConfigError, match=words):
            selection.chains(study, Path())


def test_costs_by_hand():
    study = load_experiment(
        MINIATURE, ["data.train=20", "method.epochs=2", "evaluation.rows=10", "tasks=[mini_gqa, mini_vizwiz]"]
    )
    chains = {chain.method.name: chain for chain in Selection().chains(study, Path())}
    sft = training_cost(study, chains["sft"].method, chains["sft"].stages[0])
    assert (sft.rows, sft.steps, sft.read, sft.written) == (20, 3, 40 * (48 + 4), 0)
    grpo = training_cost(study, chains["grpo"].method, chains["grpo"].stages[0])
    assert (grpo.steps, grpo.written, grpo.read) == (3, 40 * 8 * 24, 40 * 48 + 40 * 8 * 24)
    scored = evaluation_cost(study)
    assert (scored.rows, scored.read, scored.written) == (10 * 5 * 2, 100 * 48, 50 * (4 + 24))
    assert evaluation_cost(study, base=True).written == 9 * scored.written
    assert len(list(describe(study, tuple(chains.values())))) == 1 + 2 + 2 + 1
    checkpoints = 5 * 1000 + 2 * 4 * 1000  # kept, and two workers' own
    rest = disk_bytes(study, tuple(chains.values()), 0, 2)
    assert disk_bytes(study, tuple(chains.values()), 1000, 2) == rest + checkpoints


def test_workers_fit_the_machine(monkeypatch):
    from cpt_rft.sequence import pool

    monkeypatch.setattr(pool, "_cores", lambda: 8)
    monkeypatch.setattr(pool, "_available_bytes", lambda: 5 * 2**30)
    assert worker_count(3, 2, 1, 0) == 2
    assert worker_count("auto", 10, 1, 0) == 5
    assert worker_count("auto", 10, 4, 0) == 2
    assert worker_count("auto", 10, 1, 2**30) == 1
    monkeypatch.undo()
    assert worker_count("auto", 1, 1, 0) == 1


# --- identity ---


def first_identity(tiny: Tiny, *overrides: str, method: str = "sft") -> dict:
    experiment = tiny.experiment(*overrides)
    stored = read_run(tiny.directory)
    run = Run(tiny.directory, experiment, stored.base, stored.data)
    chain = Selection(methods=(method,)).chains(experiment, tiny.directory)[0]
    return survey(run, chain)[-1].identity


@pytest.mark.parametrize(
    "override",
    ["method.lr=1", "method.style=cot", "seeds=[1]", "engine.threads=2", "engine.dtype=bfloat16", "name=other"],
)
def test_what_can_change_weights_is_in_the_identity(done, override):
    assert first_identity(done, override) != first_identity(done)


@pytest.mark.parametrize(
    "override", ["engine.save_every=7", "workers=1", "output=x", "evaluation.batch_size=1", "methods.grpo.lr=1"]
)
def test_what_cannot_is_not(done, override):
    assert first_identity(done, override) == first_identity(done)


def test_a_child_carries_its_parents_identity(done):
    run = read_run(done.directory)
    for chain in Selection(methods=("sft", "grpo")).chains(run.experiment, run.directory):
        first, second = survey(run, chain)
        assert first.identity["parent"] == run.base.sha256
        assert second.identity["parent"] == first.manifest.identity_sha256
        assert second.identity["tasks"] == ["mini_gqa", "mini_superclevr"]
        assert second.manifest.provenance["parent_sha256"] == first.manifest.checkpoint_sha256


# --- a run ---


def test_a_run_is_a_function_of_its_seeds(tiny, done):
    tiny.finish("sft", "joint")
    expected, found = content(done.directory), content(tiny.directory)
    trained = [name for name in expected if name.startswith(("sft/", "joint/"))]
    assert len(trained) > 50
    assert {name: found[name] for name in trained} == {name: expected[name] for name in trained}


def test_another_seed_gives_other_weights(own):
    first = session(own, "seeds=[1]")
    assert read_config(own.directory).seeds == (0,)
    merged = first.run.experiment
    assert merged.seeds == (0, 1)
    assert list(merged.methods) == ["joint", "sft", "grpo"]  # those that were there are kept
    (own.directory / "config.json").write_text(json.dumps(dump(merged)))
    assert run_experiment(first, Selection(methods=("sft",), task="mini_gqa"))
    assert [job.label for job in first.pool.jobs] == ["sft seed1"]
    one, two = (own.directory / f"sft/order0/seed{s}/1_mini_gqa" for s in (0, 1))
    assert read_manifest(one).checkpoint_sha256 != read_manifest(two).checkpoint_sha256
    assert not two.with_name("2_mini_superclevr").exists()


def test_what_is_done_is_skipped(done):
    before = content(done.directory)
    again = session(done)
    assert not run_experiment(again, Selection())
    assert again.pool.jobs == []
    assert content(done.directory) == before


def test_a_lost_stage_is_made_again_with_the_same_bits_and_the_rest_stays(own):
    before = content(own.directory)
    second = own.directory / "sft/order0/seed0/2_mini_superclevr"
    kept = second / "checkpoint/model.safetensors"
    time = kept.stat().st_mtime_ns
    shutil.rmtree(second.with_name("1_mini_gqa"))
    again = session(own)
    assert run_experiment(again, Selection())
    assert [(job.label, job.stages) for job in again.pool.jobs] == [("sft seed0", ("mini_gqa",))]
    assert content(own.directory) == before
    assert kept.stat().st_mtime_ns == time


def test_a_lost_or_cut_record_is_scored_again(own):
    before = content(own.directory)
    (own.directory / "base/eval/mini_gqa.cot.jsonl").unlink()
    assert run_experiment(session(own), Selection())
    assert content(own.directory) == before


def test_a_task_selects_the_stages_up_to_it(own):
    for name in ("sft", "joint"):
        shutil.rmtree(own.directory / name)
    part = session(own)
    assert run_experiment(part, Selection(task="mini_gqa"))
    assert [(job.label, job.stages) for job in part.pool.jobs] == [
        ("joint seed0", ("multitask",)), ("sft seed0", ("mini_gqa",)),
    ]  # fmt: skip


def test_stale_code_is_shown_and_rerun_only_when_asked(own):
    stage = own.directory / "grpo/order0/seed0/2_mini_superclevr"
    manifest = read_manifest(stage)
    write_manifest(stage, Manifest(manifest.identity, {**manifest.provenance, "code": "other"}))
    _, second = survey(read_run(own.directory), Selection(methods=("grpo",)).chains(own.experiment(), own.directory)[0])
    assert second.is_stale("this") and second.word == "done"
    plain = session(own)
    assert not run_experiment(plain, Selection())
    asked = session(own)
    assert run_experiment(asked, Selection(), rerun_stale=True)
    assert [(job.label, job.stages) for job in asked.pool.jobs] == [("grpo seed0", ("mini_superclevr",))]
    assert read_manifest(stage).provenance["code"] == manifest.provenance["code"]
    assert read_manifest(stage).checkpoint_sha256 == manifest.checkpoint_sha256


def test_a_work_directory_of_another_identity_is_not_gone_on_with(tiny):
    run = read_run(tiny.directory)
    chain = Selection(methods=("sft",)).chains(run.experiment, run.directory)[0]
    state = survey(run, chain)[0]
    state.stage.partial.mkdir(parents=True)
    (state.stage.partial / BEGUN_NAME).write_text(json.dumps({"identity_sha256": "other"}))
    (state.stage.partial / "stray").write_text("")
    assert survey(run, chain)[0].word == "in work"
    manifest = train_stage(run, chain, state.stage, state.identity, lambda line: None)
    assert manifest.identity == state.identity
    assert not (state.stage.directory / "stray").exists()
    assert survey(run, chain)[0].word == "trained"


def test_a_stage_that_was_ready_but_not_published_is_not_trained_again(own):
    stage = own.directory / "sft/order0/seed0/1_mini_gqa"
    shutil.rmtree(stage / "eval")
    stage.rename(stage.with_name("1_mini_gqa.partial"))
    run = read_run(own.directory)
    chain = Selection(methods=("sft",)).chains(run.experiment, run.directory)[0]
    steps: list[object] = []
    train_stage(run, chain, chain.stages[0], survey(run, chain)[0].identity, steps.append)
    assert steps == []
    assert survey(run, chain)[0].word == "trained"


def test_a_ready_stage_that_was_spoiled_is_trained_again(own):
    stage = own.directory / "sft/order0/seed0/1_mini_gqa"
    expected = read_manifest(stage).checkpoint_sha256
    stage.rename(stage.with_name("1_mini_gqa.partial"))
    weights = stage.with_name("1_mini_gqa.partial") / "checkpoint/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    run = read_run(own.directory)
    chain = Selection(methods=("sft",)).chains(run.experiment, run.directory)[0]
    steps: list[object] = []
    manifest = train_stage(run, chain, chain.stages[0], survey(run, chain)[0].identity, steps.append)
    assert len(steps) == 3
    assert manifest.checkpoint_sha256 == expected


def test_a_meter_counts_all_of_a_job():
    events: list[dict] = []
    parts = [planning.Cost(1, 1, 10, 0), planning.Cost(1, 0, 10, 0)]  # 30 and 10 units of work
    meter = Meter(events.append, parts)
    meter.at(parts[0], 1, 2, "half")
    meter.finish(parts[0], "trained")
    meter.at(parts[1], 1, 1, "all")
    meter.finish(parts[1], "scored")
    assert [(event["event"], event["share"]) for event in events] == [
        ("progress", 0.375), ("part", 0.75), ("progress", 1.0), ("part", 1.0),
    ]  # fmt: skip
