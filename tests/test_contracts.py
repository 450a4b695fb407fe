"""What the contracts by name do: the paper's sampling and limits, the released SFT metric to the letter, refusals."""

import json
from pathlib import Path

import pytest
import torch

from cpt_rft.checkpoint import Policy, encode_prompts, load_policy
from cpt_rft.config.contracts import Decoding
from cpt_rft.config.schema import EvaluationConfig, Experiment
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import write_split
from cpt_rft.engines.local.generate import generate
from cpt_rft.errors import ConfigError, DataError
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import STYLES, Style, target_text, user_text
from cpt_rft.seeds import derive_seed
from cpt_rft.sequence.job import preflight
from eval.contract import fingerprint, is_forced
from eval.forced import Forced, _compare, teacher_forced
from eval.harness import Job, Subject, _forced_record, do_jobs, evaluate_checkpoint
from eval.records import RecordError, read_contracts, read_records, record_path
from eval.results import build_results
from tests.helpers.engine import TASK, make_base, make_stage, run, sft, stock_inputs
from tests.helpers.synthetic_run import experiment, write_run
from tests.helpers.tiny_run import prepared

IGNORED = -100


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return make_rows(TASK, "test", 6, seed=0)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, rows: list[Example]) -> Path:
    """A checkpoint that knows the first four labels by heart."""
    folder = tmp_path_factory.mktemp("learned")
    base = make_base(folder / "base")
    stage = make_stage(folder / "stage", base, sft(epochs=100), rows[:4])
    run(stage)
    return stage.directory / "checkpoint"


@pytest.fixture(scope="module")
def policy(learned: Path) -> Policy:
    return load_policy(learned)


def config(**changes: object) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"max_new_tokens": 8, "batch_size": 3, **changes})


def evaluate(learned: Path, rows: list[Example], out: Path, settings: EvaluationConfig) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    write_split(out.parent / f"{out.name}.parquet", rows)
    evaluate_checkpoint(learned, {TASK: out.parent / f"{out.name}.parquet"}, out, settings, "miniature")
    return out


# --- teacher forcing --------------------------------------------------------------------------------------------------


@torch.no_grad()
def released(policy: Policy, row: Example, style: Style) -> tuple[str, int, float]:
    """ComputeVQAAccuracy on the stock model's logits of the whole sequence, shifted and masked as its trainer does."""
    prompt = encode_prompts(policy, [(row.images, user_text(row, style, "miniature"))])[0]
    target = policy.tokenizer.encode(target_text(row, style) + "<|im_end|>\n", add_special_tokens=False)
    labels = torch.tensor([IGNORED] * len(prompt.ids) + target)
    preds = policy.model(**stock_inputs(policy, prompt, target)).logits.argmax(-1)[0]
    pred, label = preds[:-1], labels[1:]
    mask = label != IGNORED
    hypothesis = policy.tokenizer.decode(pred[mask], skip_special_tokens=True)
    reference = policy.tokenizer.decode(label[mask], skip_special_tokens=True)
    return hypothesis, int(mask.sum()), float(hypothesis.strip().lower() == reference.strip().lower())


@pytest.mark.parametrize("style", STYLES)
def test_teacher_forcing_is_the_released_metric(policy: Policy, rows: list[Example], style: Style) -> None:
    prompts = encode_prompts(policy, [(row.images, user_text(row, style, "miniature")) for row in rows])
    found = teacher_forced(policy, prompts, [target_text(row, style) for row in rows])
    assert [(each.said, each.tokens, each.strict) for each in found] == [released(policy, row, style) for row in rows]


def test_labels_known_by_heart_count(policy: Policy, rows: list[Example]) -> None:
    prompts = encode_prompts(policy, [(row.images, user_text(row, "direct", "miniature")) for row in rows[:4]])
    found = teacher_forced(policy, prompts, [row.answer for row in rows[:4]])
    assert [each.lenient for each in found] == [1.0] * 4
    assert [each.said.startswith(row.answer) for each, row in zip(found, rows[:4], strict=True)] == [True] * 4


@pytest.mark.parametrize(
    ("label", "said", "strict", "lenient"),
    [
        ("star", ["star", "<|im_end|>", "\n"], 1, 1),
        ("star", ["STAR", "<|im_end|>", "\n"], 1, 1),  # lower case on both sides
        (" star", ["star ", "<|im_end|>", "\n"], 1, 1),  # stripped
        ("star", ["star", "<|endoftext|>", "\n"], 1, 1),  # special tokens count for nothing
        ("star", ["star", "<|im_end|>", "x"], 0, 1),  # only the newline is missed
        ("star", ["stab", "<|im_end|>", "\n"], 0, 0),
        ("star", ["star", "x", "\n"], 0, 0),
    ],
)
def test_what_the_comparison_looks_at(policy: Policy, label: str, said: list[str], strict: int, lenient: int) -> None:
    def ids(text: str) -> list[int]:  # a token a letter, as an argmax gives one a position
        pieces = [text] if text.startswith("<|") else list(text)
        return [token for piece in pieces for token in policy.tokenizer.encode(piece, add_special_tokens=False)]

    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    predicted = [token for piece in said for token in ids(piece)]
    found = _compare(policy, predicted, [*ids(label), end, *ids("\n")], end)
    assert (found.strict, found.lenient) == (strict, lenient)


def test_teacher_forced_records_are_marked(learned, rows, tmp_path: Path) -> None:
    out = evaluate(learned, rows, tmp_path / "eval", EvaluationConfig(contract="teacher_forced", batch_size=4))
    (contract,) = read_contracts(out).values()
    assert is_forced(contract) and contract["limits"] == {}
    assert contract["scorer"] == {"preset": "compute_accuracy_vqa", "version": 1}
    records = read_records(record_path(out, TASK, "direct"))
    assert [record.lenient for record in records[:4]] == [1.0] * 4
    assert {(record.finish, record.status) for record in records} == {("stop", "answered")}


def test_both_forms_of_the_metric_stand_in_the_record(rows, tmp_path: Path) -> None:
    job = Job(TASK, "direct", Decoding(forced=True), tmp_path)
    record = _forced_record(rows[0], job, Forced("Star<", 4, strict=0.0, lenient=1.0), "c")
    assert (record.strict, record.lenient, record.tokens, record.extracted) == (0.0, 1.0, 4, "star<")


def test_a_table_of_methods_refuses_teacher_forcing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="so no methods may be compared; see 'cpt-rft audit'"):
        settings = json.loads(experiment((TASK,), (0,), 4, ("sft",)).model_dump_json())
        settings["evaluation"] |= {"contract": "teacher_forced"}
        Experiment.model_validate_json(json.dumps(settings))
    made = write_run(tmp_path / "run", tasks=(TASK, "mini_vizwiz"), seeds=(0,), rows=4, arms=("sft",))
    path = made / "base/eval/contracts.json"
    assert build_results(made)["contract"]
    forge(made, path)
    with pytest.raises(RecordError, match="the model was shown the label"):
        build_results(made)


def forge(made: Path, path: Path) -> None:
    """Put a teacher-forced contract under every record, as a careless copy would."""
    contracts = json.loads(path.read_text())
    greedy = next(name for name, terms in contracts.items() if terms["decoding"]["temperature"] == 0)
    forced = contracts[greedy] | {"decoding": {"teacher_forced": True}}
    for file in [*made.rglob("*.jsonl"), *made.rglob("contracts.json")]:
        if "eval" not in file.parts:
            continue
        if file.name == "contracts.json":
            file.write_text(json.dumps({fingerprint(forced): forced}))
        elif "sampled" in file.name:
            file.unlink()
        else:
            file.write_text(file.read_text().replace(greedy, fingerprint(forced)))


# --- the paper's settings ---------------------------------------------------------------------------------------------


def test_the_paper_contract_samples_once_at_half_temperature(learned, policy, rows, tmp_path: Path) -> None:
    limits = {"min_pixels": None, "max_pixels": None, "max_new_tokens": 8}
    settings = EvaluationConfig.model_validate({"contract": "paper", "batch_size": 4, **limits})
    records = read_records(record_path(evaluate(learned, rows, tmp_path / "eval", settings), TASK, "cot"))
    prompts = encode_prompts(policy, [(row.images, user_text(row, "cot", "miniature")) for row in rows])
    seeds = [derive_seed("samples", row.id, "cot") for row in rows]
    drawn = generate(policy, prompts, max_new_tokens=8, temperature=0.5, top_p=0.99, seeds=seeds)
    decoded = [policy.tokenizer.decode(group[0].token_ids, skip_special_tokens=True) for group in drawn]
    assert [record.response for record in records] == decoded
    again = read_records(record_path(evaluate(learned, rows, tmp_path / "again", settings), TASK, "cot"))
    assert again == records


def test_sampling_stays_within_the_nucleus_of_the_contract(learned, rows, tmp_path: Path) -> None:
    """With a nucleus of one token a hot sample is the greedy answer."""
    write_split(tmp_path / "rows.parquet", rows)
    for name, decoding in (("hot", Decoding(temperature=3.0, top_p=1e-9)), ("greedy", Decoding())):
        jobs = [Job(TASK, style, decoding, tmp_path / name) for style in STYLES]
        do_jobs(Subject(learned, config(), "miniature"), jobs, {TASK: tmp_path / "rows.parquet"})
    for style in STYLES:
        hot, greedy = (read_records(record_path(tmp_path / name, TASK, style)) for name in ("hot", "greedy"))
        assert [record.response for record in hot] == [record.response for record in greedy]


def test_a_prompt_over_the_limit_is_refused_and_not_left_out(learned, rows, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Row mini_gqa/test/00000: its prompt takes \d+ tokens, the contract allows 5"):
        evaluate(learned, rows, tmp_path / "eval", config(max_prompt_tokens=5))
    assert not list((tmp_path / "eval").glob("*.jsonl"))
    evaluate(learned, rows, tmp_path / "eval", config(max_prompt_tokens=200))


def test_a_pixel_budget_is_honoured(learned, rows, tmp_path: Path) -> None:
    """84 x 84 pixels are 9 tokens; within 56 x 56 they are 4, so the same prompt is 5 tokens shorter."""
    longest = max(len(prompt.ids) for prompt in encode_prompts(load_policy(learned), asked(rows)))
    with pytest.raises(DataError, match=f"takes {longest} tokens, the contract allows {longest - 1}"):
        evaluate(learned, rows, tmp_path / "one", config(max_prompt_tokens=longest - 1))
    evaluate(learned, rows, tmp_path / "two", config(max_prompt_tokens=longest - 5, max_pixels=3136))


def asked(rows: list[Example]) -> list[tuple]:
    return [(row.images, user_text(row, "cot", "miniature")) for row in rows]


def test_training_refuses_to_be_scored_in_other_sizes(tmp_path_factory, tmp_path: Path) -> None:
    tiny = prepared(tmp_path_factory.getbasetemp()).copy(tmp_path)
    assert preflight(tiny.experiment("evaluation.max_pixels=12845056"), tiny.base)["engine"]["name"] == "local"
    with pytest.raises(ConfigError, match=r"max_pixels 12845056 against 50176.* Fix: set evaluation.min_pixels"):
        preflight(tiny.experiment("evaluation.max_pixels=50176"), tiny.base)
    with pytest.raises(ConfigError, match="min_pixels 3136 against 262144"):
        preflight(tiny.experiment("evaluation.contract=paper"), tiny.base)


def test_a_scorer_by_name_is_in_records_and_contract(learned, rows, tmp_path: Path) -> None:
    out = evaluate(learned, rows, tmp_path / "eval", config(scorer="paper_single_label", styles=("direct",)))
    (contract,) = read_contracts(out).values()
    assert contract["scorer"]["preset"] == "paper_single_label"
