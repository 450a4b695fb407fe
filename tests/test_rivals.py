"""Rivals as chains of stages: what a stage leaves for later ones is verified, and an oracle is marked as one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt_rft.config.load import REPOSITORY, dump, load_experiment
from cpt_rft.config.restraints import Restrained
from cpt_rft.engines.base import ARTEFACTS_NAME
from cpt_rft.errors import CheckpointError, ConfigError, DataError
from cpt_rft.files import sha256_file
from cpt_rft.manifest import read_manifest
from cpt_rft.sequence.history import history_of
from cpt_rft.sequence.job import Job, do_job
from cpt_rft.sequence.lineage import first_problem, survey
from cpt_rft.sequence.plan import Selection, training_cost
from cpt_rft.sequence.rundir import read_run
from cpt_rft.sequence.stages import parent_of
from eval.results import build_results
from eval.table import markdown
from tests.helpers.tiny_run import Tiny, content, flip_last_byte, make_tiny_base

LORA = "rank: 2, alpha: 4, targets: [q_proj]"
TEXT = f"""\
name: rivals
base_model: {{base}}
output: {{output}}
tasks: [mini_gqa, mini_superclevr]
methods:
  sft: {{{{lr: 2e-3, prompts_per_step: 4, micro_batch: 4}}}}
  ewc: {{{{extends: sft, lr: 2e-3, prompts_per_step: 4, micro_batch: 2,
         ewc: {{{{strength: 1.0, rows: 2, max_new_tokens: 3}}}}, replay: {{{{rows_per_step: 1}}}}}}}}
  expand: {{{{extends: sft, lr: 0.3, prompts_per_step: 4, micro_batch: 4, lora: {{{{{LORA}, per_task: true}}}}}}}}
engine: {{{{name: local, dtype: float32, device: cpu, save_every: 1}}}}
data: {{{{train: 8, dev: 4, test: 4, general: 4}}}}
evaluation: {{{{batch_size: 4, max_new_tokens: 4, general: [mini_pope], base_samples: 1}}}}
"""
PARTS = ("replay", "ewc", "online_ewc", "l2", "lwf", "wise_ft", "lora", "o_lora", "lora_per_task")
RIVALS = [f"{arm}_{part}" for part in PARTS for arm in ("sft", "grpo")]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Complete; only to be looked at."""
    folder = tmp_path_factory.mktemp("rivals")
    tiny = Tiny.write(folder, make_tiny_base(folder / "base"), TEXT)
    tiny.prepare()
    tiny.finish()
    return tiny


@pytest.fixture
def own(done: Tiny, tmp_path: Path) -> Tiny:
    """Complete, to be spoiled."""
    return done.copy(tmp_path)


def stages(tiny: Tiny, method: str) -> tuple[Path, Path]:
    first, second = ("1_mini_gqa", "2_mini_superclevr")
    chain = tiny.directory / method / "order0" / "seed0"
    return chain / first, chain / second


def problem_of(tiny: Tiny, method: str, *, full: bool = False) -> str:
    run = read_run(tiny.directory)
    chain = Selection(methods=(method,)).chains(run.experiment, run.directory)[0]
    return str(first_problem(survey(run, chain, full=full)))


# --- configuration ---


def test_absent_parts_are_absent_from_identities() -> None:
    study = load_experiment(Path("smoke"))
    for method in study.methods.values():
        assert not set(Restrained.model_fields) & set(dump(method))
    held = load_experiment(Path("smoke"), ["methods.sft.l2.strength=0.5"]).methods["sft"]
    assert dump(held) == dump(study.methods["sft"]) | {"l2": {"strength": 0.5}}
    assert held.restraints == ("l2",)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["lora={LORA}", "ewc={EWC}"], "methods.sft.ewc: it penalises the full weights"),
        (["lora={LORA}", "l2={strength: 1}"], "methods.sft.l2: it penalises the full weights"),
        (["lora={LORA, per_task: true}", "replay={rows_per_step: 1}"], "methods.sft.replay: with lora.per_task"),
        (["lora={LORA, per_task: true}", "average={share: 0.5}"], "methods.sft.average: with lora.per_task"),
        (["lora={LORA, per_task: true, orthogonality: 0.1}"], "lora.orthogonality: with per_task no stage builds"),
        (["lora={rank: 2, alpha: 4, targets: [q_proj, q_proj]}"], "lora.targets: a layer is listed twice"),
        (["joint=true", "replay={rows_per_step: 1}"], "methods.sft.replay: a joint method has one stage"),
        (["joint=true", "ewc={EWC}"], "methods.sft.ewc: a joint method has one stage"),
        (["joint=true", "lora={LORA, orthogonality: 0.1}"], "methods.sft.lora: a joint method has one stage"),
        (["average={share: 0}"], "methods.sft.average.share = 0 should be greater than 0"),
        (["ewc={EWC, gamma: 1.5}"], "methods.sft.ewc.gamma = 1.5 should be less than or equal to 1"),
        (["replay={rows: 3}"], "unknown key 'methods.sft.replay.rows', the nearest is 'rows_per_step'"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(parts: list[str], words: str) -> None:
    ewc = "strength: 1, rows: 2, max_new_tokens: 3"
    written = [f"methods.sft.{part.replace('LORA', LORA).replace('EWC', ewc)}" for part in parts]
    with pytest.raises(ConfigError) as caught:
        load_experiment(Path("smoke"), written)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_rival_has_a_file_for_each_arm_with_its_source_and_every_key_explained() -> None:
    study = load_experiment(Path("smoke"), [f"methods=[{', '.join(RIVALS)}]"])
    for name, method in study.methods.items():
        assert method.kind == name.partition("_")[0] and method.restraints
        lines = (REPOSITORY / "configs" / "methods" / f"{name}.yaml").read_text().splitlines()
        assert any(line.startswith("# Source: ") for line in lines)
        keys = [line for line in lines if not line.startswith(("#", "kind:")) and not line.endswith(":")]
        assert all(" # " in line for line in keys), name


def test_replayed_rows_are_in_the_plan(done: Tiny) -> None:
    experiment = done.experiment()
    chain = Selection(methods=("ewc",)).chains(experiment, done.directory)[0]
    first, second = (training_cost(experiment, chain.method, stage) for stage in chain.stages)
    assert (first.steps, second.steps) == (2, 2)
    assert second.read > first.read and first.rows == second.rows


# --- what a stage leaves ---


def test_what_a_stage_leaves_is_recorded_and_verified(own: Tiny) -> None:
    first, second = stages(own, "ewc")
    for stage in (first, second):
        left = sorted(path.name for path in (stage / ARTEFACTS_NAME).iterdir())
        assert left == ["anchor.safetensors", "importance.safetensors"]
        assert sorted(read_manifest(stage).provenance["artefacts"]) == left
    assert "artefacts" not in read_manifest(stages(own, "sft")[0]).provenance
    assert problem_of(own, "ewc", full=True) == "None"
    flip_last_byte(first / ARTEFACTS_NAME / "importance.safetensors")
    assert problem_of(own, "ewc") == "None"
    assert "importance.safetensors was changed" in problem_of(own, "ewc", full=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: (path / "anchor.safetensors").unlink(), "anchor.safetensors is missing"),
        (lambda path: (path / "more").write_text(""), "more does not belong"),
        (shutil.rmtree, "anchor.safetensors is missing"),
    ],
)
def test_what_is_missing_or_surplus_is_seen_at_a_look(own: Tiny, spoil: Callable[[Path], None], words: str) -> None:
    spoil(stages(own, "ewc")[0] / ARTEFACTS_NAME)
    assert words in problem_of(own, "ewc")


def test_a_stage_takes_up_nothing_that_was_changed(own: Tiny) -> None:
    """Every byte is checked at the hand-over, though a look finds nothing wrong."""
    first, second = stages(own, "ewc")
    shutil.rmtree(second)
    flip_last_byte(first / ARTEFACTS_NAME / "anchor.safetensors")
    with pytest.raises(CheckpointError, match=r"anchor.safetensors was changed"):
        do_job(own.directory, Job("chain", "ewc", 0, 0, ("mini_superclevr",)), lambda event: None)


def test_rows_that_changed_are_not_replayed(own: Tiny) -> None:
    shutil.rmtree(stages(own, "ewc")[1])
    shutil.rmtree(stages(own, "sft")[1])
    data = own.directory / "data/mini_gqa"
    shutil.copy(data / "dev.parquet", data / "train.parquet")
    with pytest.raises(DataError, match=r"mini_gqa/train.parquet holds other rows"):
        do_job(own.directory, Job("chain", "ewc", 0, 0, ("mini_superclevr",)), lambda event: None)
    do_job(own.directory, Job("chain", "sft", 0, 0, ("mini_superclevr",), evaluate=False), lambda event: None)


def test_a_stage_made_again_with_its_history_has_the_same_bits(own: Tiny) -> None:
    before = content(own.directory)
    shutil.rmtree(stages(own, "ewc")[1])
    do_job(own.directory, Job("chain", "ewc", 0, 0, ("mini_superclevr",)), lambda event: None)
    assert content(own.directory) == before
    logs = [json.loads((stage / "train" / "log.jsonl").read_text().splitlines()[-1]) for stage in stages(own, "ewc")]
    assert [line["replayed"] for line in logs] == [0, 1]
    assert logs[0]["penalty"] is None and logs[1]["penalty"] > 0


def test_a_stage_knows_the_stages_before_it(done: Tiny) -> None:
    run = read_run(done.directory)
    chain = Selection(methods=("ewc",)).chains(run.experiment, run.directory)[0]
    assert history_of(run, chain, chain.stages[0]) == ()
    (earlier,) = history_of(run, chain, chain.stages[1])
    assert earlier.tasks == ("mini_gqa",) and earlier.data == (run.data.path("mini_gqa", "train"),)
    assert earlier.artefacts == chain.stages[0].directory / ARTEFACTS_NAME


# --- an adapter a task ---


def test_each_adapter_starts_from_the_base_and_answers_its_own_task(done: Tiny) -> None:
    run = read_run(done.directory)
    chain = Selection(methods=("expand",)).chains(run.experiment, run.directory)[0]
    assert [parent_of(run, chain, stage) for stage in chain.stages] == [(done.base, run.base.sha256)] * 2
    first, second = stages(done, "expand")
    names = ("mini_gqa", "mini_superclevr", "mini_pope")
    places = [done.directory / "base" / "eval", first / "eval", second / "eval"]
    for style in ("cot", "direct"):
        prints = {name: [sha256_file(place / f"{name}.{style}.jsonl") for place in places] for name in names}
        base, after_first, after_second = prints["mini_gqa"]
        assert base != after_first == after_second
        base, after_first, after_second = prints["mini_superclevr"]
        assert base == after_first != after_second
        assert len(set(prints["mini_pope"])) == 1


def test_records_of_an_oracle_depend_on_every_adapter(own: Tiny) -> None:
    """Other weights for an earlier task make the records of later stages void."""
    run = read_run(own.directory)
    chain = Selection(methods=("expand",)).chains(run.experiment, run.directory)[0]
    assert [state.word for state in survey(run, chain)] == ["done", "done"]
    shutil.rmtree(stages(own, "expand")[0])
    assert [state.word for state in survey(run, chain)] == ["missing", "trained"]


def test_an_oracle_is_marked_and_compared_with_no_other(done: Tiny) -> None:
    results = build_results(done.directory)
    assert results["methods"]["expand"]["task_id_oracle"] is True
    assert "task_id_oracle" not in results["methods"]["sft"]
    pairs = {name for entry in results["comparisons"] for name in (entry["first"], entry["second"])}
    assert pairs == {"sft", "ewc"}
    text = markdown(results)
    assert "| expand (task-id oracle) |" in text and "is told which task a question is from" in text
    assert "| expand |" not in text


# --- everything once, for real ---


@pytest.mark.full
def test_every_rival_runs_the_smoke_experiment_to_its_end(tmp_path: Path) -> None:
    """Eighteen methods, two stages each, scored and reported; about 150 seconds."""
    lean = ["prompts_per_step=4", "micro_batch=4"]
    arms = {"grpo": ["group=2", "max_new_tokens=6"], "sft": []}
    changes = [f"methods.{n}.{c}" for n in RIVALS for c in [*lean, *arms[n.partition("_")[0]]]]
    changes += [f"methods.{n}.{part}.max_new_tokens=6" for n in RIVALS for part in ("ewc", "lwf") if part in n]
    command = [sys.executable, "-m", "cpt_rft.cli", "run", "smoke", f"methods=[{', '.join(RIVALS)}]"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second start finds everything done
        subprocess.run([*command, f"output={tmp_path / 'run'}", *changes], check=True, cwd=REPOSITORY, env=environment)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert sorted(results["methods"]) == sorted(RIVALS) and not results["missing"]
    assert {n for n, m in results["methods"].items() if m.get("task_id_oracle")} == {
        *("sft_lora_per_task", "grpo_lora_per_task")
    }
