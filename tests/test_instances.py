"""Rows chosen by rollouts, and rows that a model wrote: what is kept, what is trained on, and from whom."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt_rft.checkpoint import encode_prompts, load_policy
from cpt_rft.config.load import REPOSITORY, dump, load_experiment
from cpt_rft.config.rollouts import Filter, Rollouts
from cpt_rft.data.example import Example
from cpt_rft.engines.base import ARTEFACTS_NAME, Source, Stage
from cpt_rft.engines.local.batches import stage_batches
from cpt_rft.engines.local.generate import generate
from cpt_rft.engines.local.grpo import GrpoObjective
from cpt_rft.engines.local.rollouts import WORK_NAME, chosen_rows
from cpt_rft.engines.local.rounds import train_rounds
from cpt_rft.engines.local.sft import SftObjective
from cpt_rft.engines.local.team import ALONE
from cpt_rft.errors import CheckpointError, ConfigError, DataError
from cpt_rft.files import read_json, read_json_lines, sha256_file
from cpt_rft.manifest import read_manifest
from cpt_rft.methods.instances import KEPT_NAME, Tried, answered, filtered, read_kept
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import target_text, user_text
from cpt_rft.scoring import score
from cpt_rft.seeds import derive_seed
from cpt_rft.sequence.job import Job, do_job
from cpt_rft.sequence.lineage import first_problem, survey
from cpt_rft.sequence.plan import Selection
from cpt_rft.sequence.rundir import read_run
from eval.results import build_results
from eval.table import markdown
from tests.helpers.engine import TASK, grpo, make_base, make_stage, run, sft
from tests.helpers.tiny_run import Tiny, content, in_child, kill_at_write

OTHER = "mini_superclevr"
RULE: dict[str, Any] = {"rollouts": 4, "rule": "drop_zero_correct"}
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
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gets some rows right always, some at times and some never."""
    folder = tmp_path_factory.mktemp("base")
    rows = [row for task in (TASK, OTHER) for row in make_rows(task, "train", 8, 0)]
    settings = sft(epochs=30, prompts_per_step=16, micro_batch=16)
    run(make_stage(folder / "stage", make_base(folder / "untaught"), settings, rows))
    return folder / "stage" / "checkpoint"


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return make_rows(TASK, "train", 12, 0)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Tiny:
    """A run of all four methods, complete; only to be looked at."""
    folder = tmp_path_factory.mktemp("instances")
    tiny = Tiny.write(folder, Path(shutil.copytree(base, folder / "base")), TEXT)
    tiny.prepare()
    for method in ("rif", "grpo", "self", "taught"):
        tiny.finish(method)
    do_job(tiny.directory, Job("base"), lambda event: None)
    return tiny


@pytest.fixture
def own(done: Tiny, tmp_path: Path) -> Tiny:
    return done.copy(tmp_path)


def kept_of(stage: Stage) -> dict[str, list[Example]]:
    rows = {TASK: [*make_rows(TASK, "train", 12, 0)]}
    return chosen_rows(stage, rows, "x", torch.float32, "cpu", ALONE)


def tries(stage: Stage) -> dict[str, int]:
    lines = read_json_lines(stage.directory / ARTEFACTS_NAME / WORK_NAME)
    return {line["id"]: line["correct"] for line in lines}


def ids(rows: list[Example]) -> list[str]:
    return [row.id for row in rows]


# --- the rule, on counts made by hand ---


@pytest.mark.parametrize(("rule", "kept"), [("drop_zero_correct", [1, 2, 3, 4]), ("drop_zero_variance", [1, 2, 3])])
def test_a_rule_keeps_the_rows_that_it_names(rows: list[Example], rule: Any, kept: list[int]) -> None:
    tried = {row.id: Tried(count) for row, count in zip(rows[:6], [0, 1, 3, 2, 4, 0], strict=True)}
    assert filtered(rows[:6], tried, Filter(rollouts=4, rule=rule), seed=0) == [rows[place] for place in kept]


@pytest.mark.parametrize(("counts", "size"), [([0] * 8 + [1, 2, 3, 4], 4), ([0] * 3 + [2] * 9, 3)])
def test_controls_have_one_size_and_come_from_their_pool(rows: list[Example], counts: list[int], size: int) -> None:
    tried = {row.id: Tried(count) for row, count in zip(rows, counts, strict=True)}

    def drawn(control: Any, seed: int = 0) -> list[Example]:
        return filtered(rows, tried, Filter(**RULE, control=control), seed)

    sets = {control: drawn(control) for control in ("solvable", "unsolvable", "random")}
    assert {len(chosen) for chosen in sets.values()} == {size}
    assert all(tried[row.id].correct > 0 for row in sets["solvable"])
    assert all(tried[row.id].correct == 0 for row in sets["unsolvable"])
    for control, chosen in sets.items():
        assert chosen == sorted(chosen, key=lambda row: row.id) == drawn(control)
    assert len({tuple(ids(drawn("random", seed))) for seed in range(5)}) > 1


def test_a_response_takes_the_place_of_the_rationale_and_is_taught_as_it_stands(rows: list[Example]) -> None:
    tried = {rows[0].id: Tried(1, "<think> so </think> \\boxed{ it }"), rows[1].id: Tried(2, None)}
    (row,) = answered(rows[:2], tried, "grpo 12ab")
    assert (row.id, row.answer, row.rationale_source) == (rows[0].id, rows[0].answer, "rollouts of grpo 12ab")
    assert target_text(row, "cot") == target_text(row, "direct") == "<think> so </think> \\boxed{ it }"
    assert target_text(replace(row, rationale_source="drawn"), "direct") == row.answer


# --- a stage ---


def test_the_tries_are_those_of_training(base: Path, rows: list[Example], tmp_path: Path) -> None:
    """Prompt, temperature, length and score are GRPO's own; only the seed is another: that of the row."""
    method = grpo(filter=Filter(**RULE), temperature=1.3, max_new_tokens=5)
    stage = make_stage(tmp_path / "stage", base, method, rows)
    run(stage)
    policy = load_policy(base)
    objective = GrpoObjective(policy, None, method, stage.prompt_preset, stage.seed_path)
    for row in rows:
        prompt = encode_prompts(policy, [(row.images, user_text(row, method.style, stage.prompt_preset))], [row.id])
        seed = derive_seed("instances", 0, row.id)
        (group,) = generate(policy, prompt, group=4, max_new_tokens=5, temperature=1.3, seeds=[seed])
        assert tries(stage)[row.id] == sum(objective.score(row, each).strict >= 0.5 for each in group), row.id


def test_the_rows_trained_on_are_the_rows_kept(base: Path, rows: list[Example], tmp_path: Path) -> None:
    seen: list[str] = []
    stage = make_stage(tmp_path / "stage", base, grpo(filter=Filter(**RULE), epochs=2), rows)
    original = GrpoObjective.gradients

    def spy(self: GrpoObjective, step: int, batch: Any, backward: Any) -> Any:
        seen.extend(row.id for row in batch)
        return original(self, step, batch, backward)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrpoObjective, "gradients", spy)
        logs = run(stage)
    kept = read_json(stage.directory / ARTEFACTS_NAME / KEPT_NAME)
    solvable = [name for name, count in tries(stage).items() if count]
    assert kept["ids"] == solvable and 0 < len(solvable) < len(rows)
    assert sorted(seen) == sorted([*solvable, *solvable])
    assert logs[-1].step == logs[-1].steps == len(logs) == -(-2 * len(solvable) // 4)
    assert kept["tasks"] == {TASK: {"rows": 12, "solvable": len(solvable), "kept": len(solvable)}}
    assert not (stage.directory / WORK_NAME).exists() and not (stage.directory / KEPT_NAME).exists()


def test_arms_that_start_from_one_model_make_the_same_tries(base: Path, rows: list[Example], tmp_path: Path) -> None:
    kept = {}
    for control in ("solvable", "unsolvable", "random"):
        method = sft(name=control, filter=Filter(**RULE, control=control, max_new_tokens=6))
        stage = make_stage(tmp_path / control, base, method, rows)
        run(stage)
        kept[control] = read_json(stage.directory / ARTEFACTS_NAME / KEPT_NAME)["ids"]
        assert {len(each) for each in kept.values()} == {len(kept["solvable"])} != {0}
    assert not set(kept["solvable"]) & set(kept["unsolvable"])
    prints = {sha256_file(tmp_path / control / ARTEFACTS_NAME / WORK_NAME) for control in kept}
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            grpo(filter=Filter(**RULE)),
            "mini_gqa: the filter of grpo (rule drop_zero_correct) keeps no row, so there is nothing to train on."
            " Fix: raise methods.grpo.filter.rollouts, take another rule or control, or drop the filter",
        ),
        (
            sft(rollouts=Rollouts(samples=2, max_new_tokens=3)),
            "mini_gqa: no row was got right in any of the tries of sft.rollouts, so there is nothing to train on."
            " Fix: raise methods.sft.rollouts.samples or max_new_tokens, or start from a better model",
        ),
    ],
)
def test_nothing_kept_is_one_clear_error(method: Any, words: str, rows: list[Example], tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "stage", make_base(tmp_path / "untaught", scale=3.0), method, rows)
    with pytest.raises(DataError) as caught:
        run(stage)
    assert str(caught.value) == words


def bits(directory: Path) -> dict[str, str]:
    """Weights, tries, kept rows, and what is there at all."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in files}


KILLED: list[tuple[Callable[[], Any], tuple[int, ...]]] = [
    (lambda: grpo(filter=Filter(**RULE)), (3, 6)),
    (lambda: sft(rollouts=Rollouts(samples=4, max_new_tokens=6, rounds=2)), (25, 62, 66)),
]


@pytest.mark.parametrize(("method", "numbers"), KILLED)
def test_killed_among_its_tries_a_stage_keeps_the_same_rows(
    base: Path, rows: list[Example], tmp_path: Path, method: Any, numbers: tuple[int, ...]
) -> None:
    whole = make_stage(tmp_path / "whole", base, method(), rows, save_every=1)
    run(whole)
    stage = make_stage(tmp_path / "stage", base, method(), rows, save_every=1)
    for number in numbers:
        shutil.rmtree(stage.directory, ignore_errors=True)
        stage.directory.mkdir()

        def work(number: int = number) -> None:
            kill_at_write(number, stage.directory)
            run(stage)

        assert in_child(work) == -signal.SIGKILL, number
        run(stage)
        assert bits(stage.directory) == bits(whole.directory), number


def test_a_torn_line_and_a_batch_that_is_not_whole_are_made_again(
    base: Path, rows: list[Example], tmp_path: Path
) -> None:
    """Whole batches are taken up as they are, the rest is written anew, and tries of another stage are not used."""
    stage = make_stage(tmp_path / "stage", base, grpo(filter=Filter(**RULE)), rows)
    kept = kept_of(stage)
    path = stage.directory / WORK_NAME
    whole = path.read_text().splitlines(keepends=True)
    marked = [line.replace('"correct": ', '"correct": 1') for line in whole]
    path.write_text("".join([whole[0], *marked[1:5], *marked[5:7]]) + marked[7][:9])
    kept_of(stage)
    assert path.read_text() == "".join([whole[0], *marked[1:5], *whole[5:]])
    path.write_text("".join(['{"fingerprint": "y"}\n', *marked[1:]]))
    assert kept_of(stage) == kept
    assert path.read_text() == "".join(whole)


# --- rows that a model wrote ---


def test_self_sft_teaches_right_answers_of_the_start_only(base: Path, rows: list[Example], tmp_path: Path) -> None:
    method = sft(rollouts=Rollouts(samples=4, max_new_tokens=6))
    stage = make_stage(tmp_path / "stage", base, method, rows)
    taught = kept_of(stage)[TASK]
    assert taught and all(is_right(row, row.rationale or "") for row in taught)
    assert {row.rationale_source for row in taught} == {"rollouts of the start of the stage"}
    objective = SftObjective(load_policy(base), method, "miniature")
    for row in taught:
        assert objective.policy.tokenizer.decode(objective.target(row)[:-1]) == row.rationale
    batches = stage_batches(stage, {TASK: taught})
    assert sorted(row.id for batch in batches for row in batch) == sorted(ids(taught))


def is_right(row: Example, text: str) -> bool:
    graded = score(text, answer=row.answer, references=row.references, kind=row.kind, style="direct")
    return graded.strict >= 0.5


def test_a_source_makes_the_tries_instead_of_the_start(base: Path, rows: list[Example], tmp_path: Path) -> None:
    untaught = make_base(tmp_path / "untaught")
    method = sft(rollouts=Rollouts(samples=4, max_new_tokens=6))
    stage = replace(make_stage(tmp_path / "a", untaught, method, rows), source=Source(base, "teacher 1"))
    run(stage)
    plain = make_stage(tmp_path / "b", base, method, rows)
    run(plain)
    assert tries(stage) == tries(plain)
    assert read_kept(stage.directory / ARTEFACTS_NAME)[0]["source"] == "teacher 1"
    weights = [sha256_file(each.directory / "checkpoint" / "model.safetensors") for each in (stage, plain)]
    assert weights[0] != weights[1]


def test_every_round_tries_with_what_the_one_before_became(base: Path, rows: list[Example], tmp_path: Path) -> None:
    method = sft(lr=1e-3, rollouts=Rollouts(samples=4, max_new_tokens=6, rounds=2))
    stage = make_stage(tmp_path / "stage", base, method, rows)
    inner: list[Stage] = []

    def train(each: Stage, report: Any) -> None:
        from cpt_rft.engines.local.train import train_stage

        inner.append(each)
        train_stage(each, ALONE, report)
        shutil.copytree(each.directory / "checkpoint", tmp_path / each.directory.name)

    logs: list[Any] = []
    train_rounds(stage, logs.append, train)
    first, second = inner
    assert (first.parent, first.source) == (base, None)
    assert second.parent == first.directory / "checkpoint" and second.source is not None
    assert second.source.checkpoint == second.parent and second.seed != first.seed
    kept = read_kept(stage.directory / ARTEFACTS_NAME)
    assert [each["source"] for each in kept] == ["the start of the stage", "round 1 of this stage"]
    steps = [-(-each["tasks"][TASK]["kept"] // 4) for each in kept]
    lines = read_json_lines(stage.directory / "train" / "log.jsonl")
    assert [line["step"] for line in lines] == [log.step for log in logs] == list(range(1, sum(steps) + 1))
    assert logs[-1].step == logs[-1].steps
    assert not list(stage.directory.glob("round*")) and not list(stage.directory.glob(".round*"))
    final = sha256_file(stage.directory / "checkpoint" / "model.safetensors")
    assert final == sha256_file(tmp_path / "round2" / "model.safetensors")
    assert final != sha256_file(tmp_path / "round1" / "model.safetensors")


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
        counts = [line["correct"] for line in read_json_lines(artefacts / WORK_NAME)]
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
        lines = read_json_lines(stage / ARTEFACTS_NAME / WORK_NAME)
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
