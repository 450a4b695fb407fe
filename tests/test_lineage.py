"""Lineage and the run directory: what is there is what it should be, or is refused with both values shown."""

import shutil
from pathlib import Path

import pytest

from cpt_rft.errors import CheckpointError, DataError, StageError
from cpt_rft.files import hash_tree
from cpt_rft.manifest import Manifest, read_manifest, write_manifest
from cpt_rft.sequence.job import Job, do_job
from cpt_rft.sequence.lineage import first_problem, survey
from cpt_rft.sequence.plan import Selection
from cpt_rft.sequence.rundir import merge, read_config, read_run
from cpt_rft.sequence.stages import parent_of
from tests.helpers.tiny_run import Tiny, edited, flip_last_byte, prepared, reference


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


def problem_of(tiny: Tiny, method: str = "sft", *, full: bool = False) -> str:
    run = read_run(tiny.directory)
    chain = Selection(methods=(method,)).chains(run.experiment, run.directory)[0]
    return str(first_problem(survey(run, chain, full=full)))


def test_a_stage_of_another_configuration_is_refused_with_both_values(own):
    with edited(own.directory / "config.json") as config:
        config["methods"]["sft"]["lr"] = 0.5
    assert "1_mini_gqa is another stage: method.lr is 0.0002 there, 0.5 is asked for" in problem_of(own)
    assert problem_of(own, "grpo") == "None"


def test_a_stage_whose_parent_has_other_weights_is_refused(own):
    first = own.directory / "sft/order0/seed0/1_mini_gqa"
    weights = first / "checkpoint/model.safetensors"
    flip_last_byte(weights)
    manifest = read_manifest(first)
    files = {name: list(record) for name, record in hash_tree(first / "checkpoint").items()}
    write_manifest(first, Manifest(manifest.identity, {**manifest.provenance, "files": files}))
    assert "2_mini_superclevr was trained from other weights than its parent has now" in problem_of(own)


@pytest.mark.parametrize("change", ["cpt_rft.sequence.lineage.VERSION", "eval.contract.SCORER_VERSION"])
def test_records_of_another_schema_or_scorer_are_scored_again(done, monkeypatch, change):
    """A newer program finds the stages done and their scores missing."""
    run = read_run(done.directory)
    chain = Selection(methods=("sft",)).chains(run.experiment, run.directory)[0]
    assert [state.word for state in survey(run, chain)] == ["done", "done"]
    monkeypatch.setattr(change, 99)
    assert [state.word for state in survey(run, chain)] == ["trained", "trained"]


def test_verification_reads_what_a_look_does_not(own):
    weights = own.directory / "sft/order0/seed0/2_mini_superclevr/checkpoint/model.safetensors"
    flip_last_byte(weights)
    assert problem_of(own) == "None"
    assert "model.safetensors was changed" in problem_of(own, full=True)


def test_rows_that_changed_are_not_trained_on(tiny, tmp_path):
    data = tiny.directory / "data/mini_gqa"
    shutil.copy(data / "dev.parquet", data / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet holds other rows than were prepared"):
        do_job(tiny.directory, Job("chain", "sft", 0, 0, ("mini_gqa",)), lambda event: None)


def test_a_stage_without_its_parent_is_not_trained(tiny):
    with pytest.raises(CheckpointError, match=r"parent stage .*1_mini_gqa is not there"):
        do_job(tiny.directory, Job("chain", "sft", 0, 0, ("mini_superclevr",)), lambda event: None)


def test_a_stage_starts_from_the_stage_right_before_it(done):
    run = read_run(done.directory)
    three = done.experiment("tasks=[mini_gqa, mini_superclevr, mini_vizwiz]")
    chain = Selection(methods=("sft",)).chains(three, done.directory)[0]
    first, second = (read_manifest(stage.directory) for stage in chain.stages[:2])
    folders = [stage.directory / "checkpoint" for stage in chain.stages]
    assert parent_of(run, chain, chain.stages[0]) == (done.base, run.base.sha256)
    assert parent_of(run, chain, chain.stages[1]) == (folders[0], first.checkpoint_sha256)
    assert parent_of(run, chain, chain.stages[2]) == (folders[1], second.checkpoint_sha256)


def test_a_stage_that_is_not_there_is_not_scored(tiny):
    with pytest.raises(CheckpointError, match=r"1_mini_gqa is not there"):
        do_job(tiny.directory, Job("chain", "sft", 0, 0, ("mini_gqa",), train=False), lambda event: None)


# --- the run directory ---


@pytest.mark.parametrize(
    "override",
    ["workers=1", "engine.save_every=5", "engine.max_skipped_steps=9", "engine.dtype=auto", "engine.device=auto"],
)
def test_free_keys_may_change_between_starts(done, override):
    stored = read_config(done.directory)
    merged = merge(stored, done.experiment(override), done.directory)
    assert merged.engine.dtype == stored.engine.dtype


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("methods.sft.lr=0.5", "methods.sft.lr is 0.0002 there, 0.5 is asked for"),
        ("engine.dtype=bfloat16", 'engine.dtype is "float32" there, "bfloat16" is asked for'),
        ("data.train=13", "data.train is 12 there, 13 is asked for"),
        ("tasks=[mini_gqa]", "tasks is .* there"),
        ("evaluation.split=dev", "evaluation.split is"),
    ],
)
def test_everything_else_is_refused_with_both_values(done, override, words):
    with pytest.raises(StageError, match=words):
        merge(read_config(done.directory), done.experiment(override), done.directory)


def test_a_run_grows_by_methods_seeds_and_orders(done):
    stored = read_config(done.directory)
    changes = ["methods=[grpo_no_cot]", "seeds=[5]", "orders=[[mini_superclevr, mini_gqa]]"]
    merged = merge(stored, done.experiment(*changes), done.directory)
    assert list(merged.methods) == ["joint", "sft", "grpo", "grpo_no_cot"]
    assert merged.seeds == (0, 5)
    assert merged.orders == (("mini_superclevr", "mini_gqa"),)
    assert merge(merged, done.experiment(), done.directory).orders == merged.orders


@pytest.mark.parametrize(
    ("name", "spoil", "error", "words"),
    [
        ("config.json", "{}", StageError, "edited by hand or damaged"),
        ("config.json", None, StageError, "holds no run yet"),
        ("base/checkpoint.json", "{", StageError, "missing or damaged"),
        ("data/data.lock.json", "[]", DataError, "edited by hand or damaged"),
        ("data/data.lock.json", None, DataError, "is not prepared"),
        ("data/mini_gqa/dev.parquet", None, DataError, "is missing, though"),
    ],
)
def test_a_damaged_run_directory_is_named(tiny, name, spoil, error, words):
    path = tiny.directory / name
    path.unlink() if spoil is None else path.write_text(spoil)
    with pytest.raises(error, match=words):
        read_run(tiny.directory)
