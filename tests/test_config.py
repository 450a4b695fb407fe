"""Configuration: what is right is typed and frozen, what is wrong names its file, its line and the nearest key."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from cpt_rft.config.document import Document
from cpt_rft.config.json_schema import DIRECTORY, documents
from cpt_rft.config.load import REPOSITORY, dump, find_directory, load_experiment
from cpt_rft.config.methods import GrpoMethod, SftMethod
from cpt_rft.errors import ConfigError
from cpt_rft.sequence.rundir import read_config

MINIATURE = REPOSITORY / "configs" / "experiments" / "miniature.yaml"
EXPERIMENTS = sorted((REPOSITORY / "configs" / "experiments").glob("*.yaml"))
METHODS = sorted((REPOSITORY / "configs" / "methods").glob("*.yaml"))
GOOD = """\
name: study
base_model: base
output: runs/study
tasks: [mini_gqa, mini_vizwiz]
seeds: [0]
methods:
  sft:
    lr: 1e-4
  slow: {extends: grpo, lr: 5e-6}
engine: {name: local, dtype: float32}
data:
  train: 16
  dev: 8
  test: 8
evaluation: {max_new_tokens: 8}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str, methods: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides, methods)
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    return str(caught.value)


def test_the_default_study_is_the_papers_in_miniature():
    study = load_experiment(MINIATURE)
    assert study.tasks == (
        "mini_scienceqa",
        "mini_textvqa",
        "mini_vizwiz",
        "mini_gqa",
        "mini_geometry3k",
        "mini_pathvqa",
        "mini_superclevr",
    )
    assert list(study.methods) == ["multitask", "sft", "grpo"]
    sft, grpo, joint = study.methods["sft"], study.methods["grpo"], study.methods["multitask"]
    assert isinstance(grpo, GrpoMethod) and isinstance(sft, SftMethod)
    assert (grpo.group, grpo.temperature, grpo.kl_coef, grpo.kl_reference) == (8, 1.0, 0.01, "base")
    assert (grpo.clip_low, grpo.clip_high, grpo.style) == (0.2, 0.3, "cot")
    assert (sft.style, sft.joint, joint.joint) == ("direct", False, True)
    assert sft.prompts_per_step == grpo.prompts_per_step == 16


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_loads(path):
    assert load_experiment(path).name == path.stem


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_every_shipped_method_can_be_named(path):
    method = load_experiment(MINIATURE, [f"methods=[{path.stem}]"]).methods[path.stem]
    assert method.name == path.stem


def test_arms_and_their_ablations_differ_in_style_only():
    methods = load_experiment(MINIATURE, ["methods=[sft, sft_cot, grpo, grpo_no_cot]"]).methods
    for native, other in (("sft", "sft_cot"), ("grpo", "grpo_no_cot")):
        left, right = dump(methods[native]), dump(methods[other])
        assert {key for key in left if left[key] != right[key]} == {"name", "style"}


@pytest.mark.parametrize("path", [*EXPERIMENTS, *METHODS], ids=lambda path: path.stem)
def test_no_file_writes_a_key_twice_and_every_file_names_its_schema(path):
    first = path.read_text().splitlines()[0]
    assert (path.parent / first.partition("$schema=")[2]).resolve().is_file()


def test_objects_are_frozen(write):
    study = load_experiment(write(GOOD))
    with pytest.raises(ValidationError):
        study.name = "other"
    with pytest.raises(ValidationError):
        study.methods["sft"].lr = 1.0


def test_files_are_laid_under_changes(write):
    study = load_experiment(write(GOOD))
    assert study.methods["sft"].lr == 1e-4
    assert study.methods["sft"].style == "direct"  # from configs/methods/sft.yaml
    assert (study.methods["slow"].name, study.methods["slow"].kind, study.methods["slow"].lr) == ("slow", "grpo", 5e-6)
    assert (study.engine.dtype, study.engine.threads) == ("float32", 1)


def test_a_method_may_be_spelled_out(write):
    own = "own: {kind: sft, style: cot, lr: 1, prompts_per_step: 2, micro_batch: 1}"
    assert (
        load_experiment(write(GOOD.replace("  slow: {extends: grpo, lr: 5e-6}", f"  {own}"))).methods["own"].lr == 1.0
    )


def test_a_method_file_beside_the_experiment_goes_before_the_repositorys(tmp_path):
    for folder in ("experiments", "methods"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "experiments" / "study.yaml"
    path.write_text(GOOD)
    own = (REPOSITORY / "configs" / "methods" / "sft.yaml").read_text().replace("epochs: 1", "epochs: 7")
    (tmp_path / "methods" / "sft.yaml").write_text(own)
    assert load_experiment(path).methods["sft"].epochs == 7


def test_overrides(write):
    path = write(GOOD)
    changed = load_experiment(path, ["method.lr=1e-6", "seeds=[0,1]", "engine.dtype=bfloat16", "evaluation.rows=null"])
    assert [method.lr for method in changed.methods.values()] == [1e-6, 1e-6]
    assert changed.seeds == (0, 1)
    assert changed.engine.dtype == "bfloat16"
    assert changed.evaluation.rows is None
    assert [m.lr for m in load_experiment(path, ["methods.slow.lr=1e-3"]).methods.values()] == [1e-4, 1e-3]
    only = load_experiment(path, ["method.lr=1"], methods=["slow"])
    assert [method.lr for method in only.methods.values()] == [1e-4, 1.0]
    assert load_experiment(path, ["method.group=4"]).methods["slow"].group == 4  # the other has no such key
    assert list(load_experiment(path, ["methods=[grpo]", "method.lr=2"]).methods) == ["grpo"]
    assert load_experiment(path, ["engine=local"]).engine.dtype == "auto"


def test_numbers_and_words_are_those_of_yaml_1_2():
    data = Document.parse("[1e-6, 1E5, .5, 3., -2, yes, on, true, null, ~, 2026-11-21, '1', 0x1]", "text").data
    assert data == [1e-6, 1e5, 0.5, 3.0, -2, "yes", "on", True, None, None, "2026-11-21", "1", "0x1"]


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("seeds: [0]", "seedz: [0]", 5, "unknown key 'seedz', the nearest is 'seeds'"),
        ("    lr: 1e-4", "    lrr: 1e-4", 8, "unknown key 'methods.sft.lrr', the nearest is 'lr'"),
        ("  dev: 8", "  devel: 8", 13, "unknown key 'data.devel', the nearest is 'dev'"),
        ("  dev: 8", "  train: 8", 13, "the key 'train' was already written at"),
        ("seeds: [0]", "name: other", 5, "the key 'name' was already written at"),
        ("    lr: 1e-4", "    lr: fast", 8, 'methods.sft.lr = "fast" should be a valid number'),
        ("    lr: 1e-4", "    lr: -1", 8, "methods.sft.lr = -1 should be greater than 0"),
        ("    lr: 1e-4", "    lr: '1e-4'", 8, 'methods.sft.lr = "1e-4" should be a valid number'),
        ("seeds: [0]", "seeds: [0, one]", 5, 'seeds.1 = "one" should be a valid integer'),
        ("seeds: [0]", "seeds: [0, 0]", 5, "seeds.1: 0 is listed twice"),
        ("seeds: [0]", "seeds: []", 5, "at least 1 item"),
        ("mini_vizwiz]", "mini_vizwis]", 4, "unknown task 'mini_vizwis', the nearest is 'mini_vizwiz'"),
        ("mini_vizwiz]", "mini_gqa]", 4, "tasks.1: 'mini_gqa' is listed twice"),
        ("seeds: [0]", "orders: [[mini_gqa]]", 5, "orders.0: ['mini_gqa'] is not a permutation"),
        ("seeds: [0]", "orders: [[mini_gqa, mini_vizwiz]]", 5, "is listed twice (the tasks themselves are order 0)"),
        ("extends: grpo", "extends: gpro", 9, "unknown method 'gpro', the nearest is 'grpo'"),
        ("  sft:", "  sftt:", 7, "unknown method 'sftt', the nearest is 'sft'"),
        ("lr: 5e-6}", "group: 1}", 9, "methods.slow.group: 1, but grpo compares the completions of a group"),
        ("lr: 5e-6}", "micro_batch: 5}", 9, "methods.slow.micro_batch: 5 does not divide prompts_per_step = 16"),
        ("    lr: 1e-4", "    group: 4", 8, "unknown key 'methods.sft.group'"),
        ("    lr: 1e-4", "    kind: sftt", 8, "unknown kind 'sftt', the nearest is 'sft'"),
        ("name: local", "name: lokal", 10, "unknown engine 'lokal', the nearest is 'local'"),
        ("dtype: float32", "dtype: float16", 10, "should be 'auto', 'float32' or 'bfloat16'"),
        ("  train: 16\n", "", 11, "the key 'data.train' is missing"),
        ("max_new_tokens: 8", "max_new_tokens: 8, general: [mini_mmu]", 15, "unknown general ability 'mini_mmu'"),
        (
            "max_new_tokens: 8",
            "contract: greddy, max_new_tokens: 8",
            15,
            "should be 'greedy', 'paper' or 'teacher_forced'",
        ),
        ("max_new_tokens: 8", "contract: greedy", 15, "the key 'evaluation.max_new_tokens' is missing"),
        ("max_new_tokens: 8", "contract: teacher_forced", 15, "the model is shown the label"),
        ("max_new_tokens: 8", "max_new_tokens: 8, scorer: best", 15, "should be 'official' or 'paper_single_label'"),
        (
            "test: 8",
            "test: 8\n  prompt_preset: papr_rft",
            15,
            "unknown prompt preset 'papr_rft', the nearest is 'paper_rft'",
        ),
        ("seeds: [0]", "workers: many", 5, "workers = \"many\" should be 'auto' or a valid integer"),
        ("seeds: [0]", "seeds: [0", 6, "not valid YAML"),
        ("output: runs/study\n", "", 1, "the key 'output' is missing"),
        ("engine: {name: local, dtype: float32}", "engine: {dtype: float32}", 10, "'engine' is missing or has no name"),
        ("engine: {name: local, dtype: float32}\n", "", 1, "'engine' is missing or has no name"),
        ("  slow: {extends: grpo, lr: 5e-6}", "  slow: 5", 9, "the method 'slow' is no mapping"),
    ],
)
def test_what_is_wrong_names_its_file_and_line(write, old, new, line, words):
    assert GOOD.count(old) == 1
    path = write(GOOD.replace(old, new))
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: "), message
    assert words in message


def test_a_mistake_in_a_method_file_names_that_file(tmp_path):
    (tmp_path / "methods").mkdir()
    own = tmp_path / "methods" / "sft.yaml"
    own.write_text("kind: sft\nstyle: direct\nlr: 1\nprompts_per_step: 4\nmicro_bach: 4\n")
    path = tmp_path / "study.yaml"
    path.write_text(GOOD)
    assert refusal(path).startswith(f"{own}:5: unknown key 'methods.sft.micro_bach', the nearest is 'micro_batch'")
    own.write_text("kind: sft\nname: sft\n")
    assert refusal(path).startswith(f"{own}:2: a method's name is that of its file")
    own.write_text("kind: sft\nkind: sft\n")
    assert refusal(path).startswith(f"{own}:2: the key 'kind' was already written at {own}:1")
    own.write_text("style: cot\n")
    assert "the key 'methods.sft.kind' is missing" in refusal(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.lrr=1", "unknown key 'method.lrr', the nearest is 'method.lr'"),
        ("method.lr.x=1", "unknown key 'method.lr.x'"),
        ("methods.slw.lr=1", "unknown method 'slw', the nearest is 'slow'"),
        ("methods=[sft, sft]", "the method 'sft' is listed twice"),
        ("methods=[1]", "1 is no name of a method"),
        ("methods=sft", "'methods' is missing or no list"),
        ("methods={}", "at least 1 item"),
        ("engine.dtipe=1", "unknown key 'engine.dtipe', the nearest is 'dtype'"),
        ("engine.dtype.x=1", "'engine.dtype' has no keys below it"),
        ("data.train=many", 'data.train = "many" should be a valid integer'),
        ("seed=1", "unknown key 'seed', the nearest is 'seeds'"),
        ("lr", "'lr' is not KEY=VALUE"),
        ("data..train=1", "is not KEY=VALUE"),
        ("seeds=[0", "not valid YAML"),
    ],
)
def test_a_wrong_override_names_itself(write, override, words):
    message = refusal(write(GOOD), override)
    assert message.startswith("command line"), message
    assert override in message and words in message


def test_a_method_that_was_not_listed_cannot_be_selected(write):
    assert "unknown method 'grpo', the nearest is" in refusal(write(GOOD), methods=("grpo",))


def test_files_that_are_none(tmp_path, write):
    assert "There is no experiment file" in refusal(tmp_path / "miniatur.yaml")
    assert "miniature.yaml" in refusal(tmp_path / "miniatur.yaml")
    assert ":1: this is not a mapping" in refusal(write("- 1\n"))
    assert ":1: this is not a mapping" in refusal(write(""))
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "sft.yaml").mkdir()
    assert "cannot be read" in refusal(write(GOOD))


def test_a_bare_name_is_an_experiment_of_the_repository():
    assert load_experiment(Path("miniature")) == load_experiment(MINIATURE)


def test_directories_are_relative_to_here_or_to_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_directory("cpt_rft/miniature") == REPOSITORY / "cpt_rft" / "miniature"
    (tmp_path / "cpt_rft" / "miniature").mkdir(parents=True)
    assert find_directory("cpt_rft/miniature") == Path("cpt_rft/miniature")
    assert find_directory(str(tmp_path)) == tmp_path


def test_a_resolved_experiment_reads_back_as_itself(tmp_path, write):
    study = load_experiment(write(GOOD))
    (tmp_path / "config.json").write_text(json.dumps(dump(study)))
    assert read_config(tmp_path) == study


@pytest.mark.parametrize("name", sorted(documents()))
def test_the_schemas_for_editors_are_fresh(name):
    assert json.loads((DIRECTORY / name).read_text()) == documents()[name], "run 'cpt-rft schema'"


def test_every_key_has_a_help_text():
    for name, document in documents().items():
        parts = [document, *document.get("$defs", {}).values()]
        for properties in [part["properties"] for part in parts if "properties" in part]:
            assert all("description" in value for value in properties.values()), name
