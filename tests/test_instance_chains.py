"""Methods that choose or write their rows by rollouts, as chains: configuration, plan, lineage, results."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from cpt_rft.config.load import REPOSITORY, dump, load_experiment
from cpt_rft.data.example import Example
from cpt_rft.engines.base import ARTEFACTS_NAME
from cpt_rft.errors import CheckpointError, ConfigError
from cpt_rft.files import read_json, read_json_lines
from cpt_rft.manifest import read_manifest
from cpt_rft.methods.instances import KEPT_NAME, TRIES_NAME
from cpt_rft.miniature.world import make_rows
from cpt_rft.sequence.job import Job, do_job
from cpt_rft.sequence.lineage import first_problem, survey
from cpt_rft.sequence.plan import Selection
from cpt_rft.sequence.rundir import read_run
from eval.results import build_results
from eval.table import markdown
from tests.helpers.engine import TASK
from tests.helpers.instances import OTHER, half_taught, is_right
from tests.helpers.tiny_run import Tiny, content, one_line_error

METHODS = """\
  rif: {{extends: grpo, style: direct, lr: 2e-4, prompts_per_step: 4, micro_batch: 4, group: 2, max_new_tokens: 6,
         filter: {{rule: drop_zero_variance}}}}
  grpo: {{style: direct, lr: 1e-3, prompts_per_step: 4, micro_batch: 4, group: 4, max_new_tokens: 6}}
  self: {{extends: self_sft, style: direct, lr: 1e-4, prompts_per_step: 4, micro_batch: 4,
          rollouts: {{samples: 4, max_new_tokens: 6}}}}
  taught: {{extends: sft_on_rollouts, style: direct, lr: 1e-3, prompts_per_step: 4, micro_batch: 4,
            rollouts: {{samples: 4, max_new_tokens: 6}}}}
"""
TEXT = f"""\
name: instances
base_model: {{base}}
output: {{output}}
tasks: [mini_gqa, mini_superclevr]
methods:
{METHODS}engine: {{{{name: local, dtype: float32, device: cpu, save_every: 1}}}}
data: {{{{train: 12, dev: 4, test: 4, general: 4}}}}
evaluation: {{{{batch_size: 4, max_new_tokens: 4, general: [], base_samples: 0}}}}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A run of all four methods, complete; only to be looked at."""
    folder = tmp_path_factory.mktemp("instances")
    base = half_taught(tmp_path_factory.getbasetemp())
    tiny = Tiny.write(folder, Path(shutil.copytree(base, folder / "base")), TEXT)
    tiny.prepare()
    for method in ("rif", "grpo", "self", "taught"):
        tiny.finish(method)
    do_job(tiny.directory, Job("base"), lambda event: None)
    return tiny


@pytest.fixture
def own(done: Tiny, tmp_path: Path) -> Tiny:
    return done.copy(tmp_path)


def ids(rows: list[Example]) -> list[str]:
    return [row.id for row in rows]


# --- configuration and plan ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["sft.filter={rule: drop_zero}"], "methods.sft.filter.rule"),
        (["sft.filter={rule: drop_zero_correct}"], "methods.sft.filter.max_new_tokens: null, but sft has no rollouts"),
        (["grpo.filter={rule: drop_zero_correct, max_new_tokens: 3}"], "the tries are those of training; remove it"),
        (["sft.rollouts={max_new_tokens: 3}", "sft.filter={rule: drop_zero_correct, max_new_tokens: 3}"],
         "methods.sft.filter: rollouts leaves out the rows without a right one"),
        (["sft.rollouts={max_new_tokens: 3, rounds: 2}", "sft.l2={strength: 1}"], "with several rounds there is no l2"),
        (["sft.rollouts={max_new_tokens: 3, rounds: 2, from_method: grpo}", "sft.style=cot"], "write 1"),
        (["sft.rollouts={max_new_tokens: 3, from_method: grp}"], "'grp' is no method of the experiment, the nearest"),
        (["sft.rollouts={max_new_tokens: 3, from_method: sft}"], "sft learns from sft: none can be the first"),
        (["sft.rollouts={max_new_tokens: 3, from_method: grpo}"], "grpo answers in the style cot; write style: cot"),
        (["sft.rollouts={max_new_tokens: 3, from_method: multitask}"], "other stages (joint: True and False)"),
        (["grpo.rollouts={max_new_tokens: 3}"], "unknown key 'methods.grpo.rollouts'"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_by_name(changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(Path("smoke"), [f"methods.{change}" for change in changes])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_absent_parts_are_absent_from_identities() -> None:
    study = load_experiment(Path("smoke"))
    assert not {"filter", "rollouts"} & {key for method in study.methods.values() for key in dump(method)}


def test_a_plan_says_that_its_rows_are_upper_bounds(done: Tiny) -> None:
    status, out, _ = done.command("plan")
    assert status == 0
    assert "at most these rows and steps: rif, self, taught (rollouts choose the rows)" in out
    status, out, _ = done.command("plan", "--method", "grpo")
    assert "at most" not in out


# --- chains ---


def stage_of(tiny: Tiny, method: str, place: int = 1) -> Path:
    return tiny.directory / method / "order0" / "seed0" / f"{place}_{(TASK, OTHER)[place - 1]}"


def problem_of(tiny: Tiny, method: str) -> str:
    run_ = read_run(tiny.directory)
    chain = Selection(methods=(method,)).chains(run_.experiment, run_.directory)[0]
    return str(first_problem(survey(run_, chain)))


def test_the_share_kept_is_in_manifest_results_and_table(done: Tiny) -> None:
    results = build_results(done.directory)
    seed = results["methods"]["rif"]["seeds"]["0"]
    for place, task in enumerate((TASK, OTHER), start=1):
        artefacts = stage_of(done, "rif", place) / ARTEFACTS_NAME
        counts = [line["correct"] for line in read_json_lines(artefacts / TRIES_NAME)]
        kept = sum(0 < count < 8 for count in counts)
        (recorded,) = read_manifest(artefacts.parent).provenance["kept"]
        assert recorded["tasks"] == {task: {"rows": 12, "solvable": sum(c > 0 for c in counts), "kept": kept}}
        assert [entry["share"] for entry in seed["kept"][task]] == [pytest.approx(kept / 12, abs=1e-6)]
    assert "kept" not in results["methods"]["grpo"]["seeds"]["0"]
    shares = [f"{100 * seed['kept'][task][0]['share']:.1f}" for task in (TASK, OTHER)]
    assert f"| rif | {shares[0]} | {shares[1]} |" in markdown(results)
    assert "| grpo | " not in markdown(results).partition("Rows kept by rollouts")[2].partition("###")[0]


def test_rows_are_taught_from_the_checkpoint_of_the_same_task(done: Tiny) -> None:
    for place, task in enumerate((TASK, OTHER), start=1):
        source, stage = stage_of(done, "grpo", place), stage_of(done, "taught", place)
        weights, provenance = read_manifest(source).checkpoint_sha256, read_manifest(stage).provenance
        assert provenance["source_sha256"] == weights
        name = f"grpo/order0/seed0/{source.name} {weights[:12]}"
        assert [each["source"] for each in provenance["kept"]] == [name]
        assert read_manifest(stage).identity["source"] == read_manifest(source).identity_sha256
        lines = read_json_lines(stage / ARTEFACTS_NAME / TRIES_NAME)
        rows = {row.id: row for row in make_rows(task, "train", 12, 0)}
        taught = [(rows[line["id"]], line["response"]) for line in lines if line["response"] is not None]
        assert taught and all(is_right(row, response) for row, response in taught)
        assert ids([row for row, _ in taught]) == read_json(stage / ARTEFACTS_NAME / KEPT_NAME)["ids"]
    own_start = read_manifest(stage_of(done, "self", 2)).provenance
    assert "source_sha256" not in own_start
    parent = own_start["parent_sha256"][:12]
    assert own_start["kept"][0]["source"] == f"self/order0/seed0/1_mini_gqa {parent}"
    assert own_start["kept"][0]["source"].endswith(read_manifest(stage_of(done, "self")).checkpoint_sha256[:12])


def test_a_source_that_is_not_trained_is_named_with_the_command(own: Tiny) -> None:
    for method in ("grpo", "taught"):
        shutil.rmtree(own.directory / method)
    with pytest.raises(CheckpointError) as caught:
        do_job(own.directory, Job("chain", "taught", 0, 0, (TASK,)), lambda event: None)
    assert str(caught.value) == (
        "taught learns from grpo/order0/seed0/1_mini_gqa, which is not trained yet."
        " Fix: 'cpt-rft train EXPERIMENT.yaml grpo mini_gqa --seed 0', or run both methods together"
    )


def test_a_source_that_was_made_anew_with_other_weights_is_noticed(own: Tiny) -> None:
    assert problem_of(own, "taught") == "None"
    shutil.rmtree(stage_of(own, "grpo"))
    assert problem_of(own, "taught") == "None"  # it will be made again, with the same bits
    shutil.copytree(stage_of(own, "self"), stage_of(own, "grpo"))
    assert "learned from other weights than its source has now" in problem_of(own, "taught")


def test_a_source_whose_bytes_changed_is_not_used(own: Tiny) -> None:
    shutil.rmtree(own.directory / "taught")
    path = stage_of(own, "grpo") / "checkpoint" / "model.safetensors"
    body = path.read_bytes()
    path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"grpo/order0/seed0/1_mini_gqa/checkpoint/model.safetensors was changed"):
        do_job(own.directory, Job("chain", "taught", 0, 0, (TASK,)), lambda event: None)


def test_another_source_is_another_stage(own: Tiny) -> None:
    run_ = read_run(own.directory)
    for seed, method in ((0, "rif"), (0, "grpo")):
        methods = dict(run_.experiment.methods)
        taught = methods["taught"]
        assert taught.kind == "sft" and taught.rollouts is not None
        methods["grpo"] = methods["grpo"].model_copy(update={"lr": 1e-3 if method == "grpo" else 2e-3})
        other = replace(run_, experiment=run_.experiment.model_copy(update={"methods": methods}))
        chain = Selection(methods=("taught",)).chains(other.experiment, other.directory)[0]
        problem = str(first_problem(survey(other, chain)))
        assert ("source is" in problem) == (method == "rif"), (seed, problem)


def test_a_chain_made_again_has_the_same_bits(own: Tiny) -> None:
    before = content(own.directory)
    shutil.rmtree(own.directory / "taught")
    shutil.rmtree(stage_of(own, "self", 2))
    for method in ("self", "taught"):
        own.finish(method)
    assert content(own.directory) == before


# --- cpt-rft filter ---


def filter_job(tries: Literal["counts", "texts"]) -> Job:
    return Job("chain", "rif", 0, 0, (TASK,), train=False, evaluate=False, measure=False, tries=tries)


def test_rows_are_filtered_ahead_and_training_goes_on_with_them(own: Tiny) -> None:
    before = content(own.directory)
    kept = read_json(stage_of(own, "rif") / ARTEFACTS_NAME / KEPT_NAME)
    shutil.rmtree(own.directory / "rif")
    ticks: list[str] = []
    do_job(own.directory, filter_job("counts"), lambda event: ticks.append(event.get("text", "")))
    work = stage_of(own, "rif").with_suffix(".partial")
    assert not (work / "checkpoint").exists() and not stage_of(own, "rif").exists()
    assert read_json(work / KEPT_NAME) == kept and ticks[-1] == "tried" and "trying row 12/12" in ticks
    header, *lines = (work / TRIES_NAME).read_text().splitlines()
    torn = [header, *lines[:4], lines[4][:20]]
    (work / TRIES_NAME).write_text("\n".join(torn))
    do_job(own.directory, filter_job("counts"), lambda event: None)
    assert (work / TRIES_NAME).read_text().splitlines() == [header, *lines]
    own.finish("rif")
    assert content(own.directory) == before


def test_controls_are_those_of_a_stage_with_that_control(done: Tiny) -> None:
    kept = read_json(stage_of(done, "rif") / ARTEFACTS_NAME / KEPT_NAME)
    counts = {
        line["id"]: line["correct"] for line in read_json_lines(stage_of(done, "rif") / ARTEFACTS_NAME / TRIES_NAME)
    }
    unsolvable = [name for name, count in counts.items() if count == 0]
    size = min(len(kept["ids"]), len(unsolvable))
    assert size and {len(ids) for ids in kept["controls"].values()} == {size}
    assert set(kept["controls"]["unsolvable"]) <= set(unsolvable)
    assert all(counts[name] > 0 for name in kept["controls"]["solvable"])


def test_texts_are_kept_when_asked_and_change_nothing_else(own: Tiny) -> None:
    artefacts = stage_of(own, "rif") / ARTEFACTS_NAME
    plain = read_json_lines(artefacts / TRIES_NAME)
    shutil.rmtree(own.directory / "rif")
    do_job(own.directory, filter_job("counts"), lambda event: None)
    do_job(own.directory, filter_job("texts"), lambda event: None)  # tried again, now with texts
    own.finish("rif")
    lines = read_json_lines(artefacts / TRIES_NAME)
    assert [{key: line[key] for key in ("id", "task", "correct")} for line in lines] == plain
    rows = {row.id: row for row in make_rows(TASK, "train", 12, 0)}
    for line in lines:
        assert line["right"] == [is_right(rows[line["id"]], text) for text in line["texts"]] and len(line["texts"]) == 8
        assert sum(line["right"]) == line["correct"]
    own.file.write_text(TEXT.format(base=own.base, output=own.directory))
    status, out, _ = own.command("filter", "rif", TASK, "--keep-text")
    assert status == 0 and f"{TASK}: 12 rows" in out and "control random" in out


def test_a_method_without_a_filter_and_texts_that_are_gone_are_refused(done: Tiny) -> None:
    error = one_line_error(done.command("filter", "grpo", TASK))
    assert "grpo has no filter" in error and "methods.grpo.filter=" in error
    error = one_line_error(done.command("filter", "rif", TASK, "--keep-text"))
    assert "is trained, and the texts of its tries were not kept" in error


@pytest.mark.full
def test_every_arm_runs_the_smoke_experiment_to_its_end(tmp_path: Path) -> None:
    """Five methods, two stages each, by the command with two workers; about 60 seconds."""
    names = ("rif_grpo", "self_sft", "self_sft_iterative", "sft_on_rollouts", "grpo")  # the source is listed last
    lean = [f"methods.{name}.{key}=4" for name in names for key in ("prompts_per_step", "micro_batch")]
    lean += [f"methods.{name}.group=2" for name in ("rif_grpo", "grpo")]
    command = [sys.executable, "-m", "cpt_rft.cli", "run", "smoke", f"methods=[{', '.join(names)}]", "workers=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second start finds everything done
        subprocess.run([*command, f"output={tmp_path / 'run'}", *lean], check=True, cwd=REPOSITORY, env=environment)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert sorted(results["methods"]) == sorted(names) and not results["missing"]
    kept = {name: method["seeds"]["0"].get("kept", {}) for name, method in results["methods"].items()}
    rounds = {name: [len(kept[name][task]) for task in results["tasks"]] for name in names[:4]}
    assert rounds == {name: [3, 3] if name == "self_sft_iterative" else [1, 1] for name in names[:4]}
    assert not kept["grpo"]
