"""One run directory, one contract, two engines: each method is trained by its own and knows it."""

import pytest

from cpt_rft.config.load import dump, load_experiment
from cpt_rft.errors import ConfigError, StageError
from cpt_rft.files import read_json
from cpt_rft.manifest import read_manifest
from cpt_rft.sequence.job import Job, do_job, preflight
from cpt_rft.sequence.lineage import survey
from cpt_rft.sequence.plan import Selection
from cpt_rft.sequence.rundir import CONFIG_NAME, merge, read_config, read_run
from tests.helpers.tiny_run import Tiny, prepared
from tests.helpers.tree import ROOT

SECOND = "{name: local, dtype: float32, device: cpu, save_every: 1, gradient_checkpointing: true, threads: 2}"
PAPER = ROOT / "configs/experiments/paper_qwen2_5_vl_7b.yaml"


@pytest.fixture
def one(tmp_path_factory, tmp_path) -> Tiny:
    """A prepared run directory with one engine."""
    return prepared(tmp_path_factory.getbasetemp()).copy(tmp_path / "one")


@pytest.fixture
def two(one, tmp_path) -> Tiny:
    """The same with a second engine for the methods of reinforcement."""
    tiny = one.copy(tmp_path / "two")
    tiny.file.write_text(tiny.file.read_text() + f"rft_engine: {SECOND}\n")
    (tiny.directory / CONFIG_NAME).unlink()
    tiny.prepare()
    return tiny


def identities(tiny: Tiny) -> dict[str, dict]:
    run = read_run(tiny.directory)
    chains = Selection().chains(run.experiment, run.directory)
    return {chain.method.name: survey(run, chain)[0].identity for chain in chains}


def test_every_stage_is_of_the_engine_that_trains_it(one, two):
    alone, both = identities(one), identities(two)
    assert both["sft"] == alone["sft"] and both["joint"] == alone["joint"]
    assert both["grpo"] == {**alone["grpo"], "engine": {**alone["grpo"]["engine"], "threads": 2}}


def test_the_second_engine_trains(two):
    do_job(two.directory, Job("chain", "grpo", 0, 0, ("mini_gqa",), evaluate=False, measure=False), lambda event: None)
    stage = two.directory / "grpo/order0/seed0/1_mini_gqa"
    assert read_manifest(stage).identity["engine"]["threads"] == 2


def test_an_experiment_with_one_engine_says_nothing_of_a_second(one):
    assert "rft_engine" not in dump(one.experiment()) and "rft_engine" not in dump(one.experiment("rft_engine=null"))
    assert "rft_engine" not in read_json(one.directory / CONFIG_NAME)


def test_the_second_engine_keeps_what_was_resolved_and_refuses_what_differs(two):
    stored = read_config(two.directory)
    words = ["rft_engine.dtype=auto", "rft_engine.device=auto", "rft_engine.save_every=7"]
    merged = merge(stored, two.experiment(*words), two.directory)
    assert merged.rft_engine is not None and (merged.rft_engine.dtype, merged.rft_engine.device) == ("float32", "cpu")
    with pytest.raises(StageError, match=r"rft_engine.threads is 2 there, 3 is asked for"):
        merge(stored, two.experiment("rft_engine.threads=3"), two.directory)
    with pytest.raises(StageError, match="rft_engine"):
        merge(stored, two.experiment("rft_engine=null"), two.directory)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rft_engine.treads=1", "unknown key 'rft_engine.treads', the nearest is 'threads'"),
        ("rft_engine={dtype: float32}", "'rft_engine' is missing or has no name"),
        ("rft_engine=lokal", "unknown engine 'lokal', the nearest is 'local'"),
        ("rft_engine.name=lokal", "unknown engine 'lokal', the nearest is 'local'"),
    ],
)
def test_a_wrong_second_engine_is_named(two, override, message):
    with pytest.raises(ConfigError, match=message):
        two.experiment(override)


def test_both_engines_must_train_on_the_pictures_that_are_scored(one):
    other = "rft_engine={name: llamafactory, device: cpu, max_pixels: 3136}"
    with pytest.raises(
        ConfigError,
        match=r"rft_engine trains on pictures of other sizes than are scored: max_pixels 3136 against \d+\. "
        r"Fix: .* or give rft_engine.min_pixels=3136 rft_engine.max_pixels=\d+",
    ):
        preflight(one.experiment(other), one.base)


def test_a_missing_environment_is_named_before_the_base_is_scored_and_only_where_it_is_needed(
    one, tmp_path, monkeypatch
):
    monkeypatch.setenv("CPT_RFT_ENVS", str(tmp_path / "none"))
    one.file.write_text(one.file.read_text() + "rft_engine: {name: llamafactory, device: cpu}\n")
    (one.directory / CONFIG_NAME).unlink()
    one.prepare()  # it is needed for reinforcement only, so that no one else is kept from the run directory
    status, _, err = one.command("run", "--method", "grpo")
    assert status == 2 and "setup_llamafactory.sh" in err
    assert not (one.directory / "base/eval").exists()


def test_the_papers_two_arms_are_scored_by_one_contract():
    experiment = load_experiment(PAPER)
    engines = {name: experiment.engine_for(method).name for name, method in experiment.methods.items()}
    reinforced = dict.fromkeys(("grpo", "grpo_no_kl", "grpo_no_cot", "rloo", "remax", "rif_grpo"), "easyr1")
    assert engines == {"sft": "llamafactory", "multitask": "llamafactory", **reinforced}
    limits = (experiment.evaluation.min_pixels, experiment.evaluation.max_pixels)
    assert {engine.pixel_limits for engine in experiment.engines.values()} == {limits}
    assert experiment.asked_workers == 1
    released = ["engine=llamafactory_matched", "rft_engine=easyr1_paper"]
    other = load_experiment(PAPER, [*released, "evaluation.min_pixels=200704", "evaluation.max_pixels=1003520"])
    limits = (other.evaluation.min_pixels, other.evaluation.max_pixels)
    assert {engine.pixel_limits for engine in other.engines.values()} == {limits}


def test_the_released_settings_of_reinforcement():
    method = load_experiment(PAPER, ["methods=[grpo_paper]"]).methods["grpo_paper"]
    tasks = ("scienceqa", "textvqa", "vizwiz", "gqa", "geometry3k", "pathvqa", "superclevr")
    assert [method.epochs_of([task]) for task in tasks] == [1, 1, 1, 1, 10, 1, 3]
    stated = dump(method)
    # Source: RFTvsSFT@7d4f50e EasyR1/examples/config.yaml.
    wanted = {"lr": 1e-6, "weight_decay": 0.01, "group": 8, "temperature": 1.0, "max_new_tokens": 1024}
    wanted |= {"max_prompt_tokens": 4096, "prompts_per_step": 128, "rollout_steps": 4, "paper_rounding": True}
    wanted |= {"kl_coef": 0.01, "kl_estimator": "k3", "clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}
    assert {key: stated[key] for key in wanted} == wanted
