"""Ask lm-evaluation-harness for the same rows (`python -m eval.delegate`), and say why it finds what we do not.

It runs in an environment of its own, against a server of OpenAI's protocol that serves the checkpoint, and exits with 0
after many a failure: what counts is whether its results are there, whole and finite. It gets our rows as local tasks,
each row's picture first and then its text, and scores by its own ``exact_match``, which forgives case and punctuation.
"""

import argparse
import base64
import io
import json
import math
import os
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from cpt_rft.data.example import IMAGE_TAG, Example
from cpt_rft.data.parquet import read_split
from cpt_rft.data.picture import Picture, decode_picture
from cpt_rft.errors import UserError
from cpt_rft.files import write_json_atomic, write_text_atomic
from cpt_rft.prompts import PRESETS, STYLES, Style, user_text
from eval.backends import BackendError
from eval.records import Record, read_records, record_path
from eval.table import Sheet
from eval.words import NONE, number

METRIC = "exact_match,none"
_FIX = "name with --python what 'bash scripts/setup_lm_eval.sh' prints, and with --url a server that answers"
#: In the folder of a task: how lm-evaluation-harness gets a row's pictures.
_PICTURES = '''"""Pictures of a row."""
import base64, io
from PIL import Image

def pictures(row):
    return [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in row["pictures"]]
'''


@dataclass(frozen=True)
class Sample:
    """What lm-evaluation-harness says of one row: the text that it got, and 1 if it finds it right, else 0."""

    response: str
    score: float


@dataclass(frozen=True)
class Server:
    """Who answers both: base address with its version, name of the model there, and how long an answer may be."""

    url: str
    model: str
    max_new_tokens: int
    concurrency: int = 8


def write_task(folder: Path, rows: Sequence[Example], style: Style, preset: str, max_new_tokens: int) -> None:
    """Rows as a local task of lm-evaluation-harness, named after ours.

    Raises:
        UserError: A picture stands elsewhere than at the beginning, where lm-evaluation-harness always puts it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        text = user_text(row, style, preset)
        bare = text[len(IMAGE_TAG) * len(row.images) :]
        if text != IMAGE_TAG * len(row.images) + bare or IMAGE_TAG in bare:
            problem = f"Row {row.id} has a picture inside its text; lm-evaluation-harness would move it to the front."
            raise UserError(problem, "delegate tasks whose pictures come first")
        pictures = [_png(image, row.id) for image in row.images]
        lines.append(json.dumps({"id": row.id, "text": bare, "pictures": pictures, "answer": row.answer}) + "\n")
    task = rows[0].task
    write_text_atomic(folder / f"{task}.jsonl", "".join(lines))
    terms: dict[str, Any] = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{task}.jsonl").resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": max_new_tokens, "temperature": 0.0, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "take_first"}]}],
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
            | {"ignore_case": True, "ignore_punctuation": True}
        ],
    }
    pictures_line = ""
    if any(row.images for row in rows):
        write_text_atomic(folder / "pictures.py", _PICTURES)
        pictures_line = "doc_to_image: !function pictures.pictures\n"
    # JSON is YAML, but for the one value that is a tag.
    body = "".join(f"{key}: {json.dumps(value)}\n" for key, value in terms.items())
    write_text_atomic(folder / f"{task}.yaml", body + pictures_line)


def _png(picture: Picture, where: str) -> str:
    stream = io.BytesIO()
    decode_picture(picture, where).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def run(python: str, tasks: Mapping[str, int], folder: Path, out: Path, server: Server) -> dict[str, dict[str, Sample]]:
    """Let lm-evaluation-harness do the tasks of a folder.

    Args:
        python: Interpreter of its environment.
        tasks: Rows by task.
        folder: Where `write_task` wrote them.
        out: New directory of its results.
        server: Who answers.

    Returns:
        By task, the samples by row.

    Raises:
        BackendError: It failed, whatever it exited with; or its results are not there, not whole or not finite.
    """
    if out.exists():
        raise BackendError(f"{out} exists already, and older results would be taken for new ones.", "choose another")
    address = f"model={server.model},base_url={server.url}/chat/completions,num_concurrent={server.concurrency}"
    command = [python, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--model_args"]
    command += [f"{address},max_retries=2,max_images=8", "--tasks", *tasks, "--include_path", str(folder.resolve())]
    command += ["--apply_chat_template", "--log_samples", "--output_path", str(out.resolve())]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str((folder / "cache").resolve())}
    key = {"OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY", "none")}
    try:
        done = subprocess.run(command, env={**os.environ, **quiet, **key}, capture_output=True, text=True)
    except OSError as error:
        raise BackendError(f"{python} does not start ({error.strerror}).", _FIX) from error
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["it said nothing"]
    results = sorted(out.rglob("results_*.json"))
    if done.returncode or len(results) != 1:
        last = next((line for line in reversed(said) if "Error" in line), said[-1])
        raise BackendError(
            f"lm-evaluation-harness left no results (exit status {done.returncode}): {last}",
            _FIX,
        )
    return {task: _samples(results[0], task, rows) for task, rows in tasks.items()}


def _samples(results: Path, task: str, rows: int) -> dict[str, Sample]:
    """The samples of a task, after holding its mean against them and their number against the rows."""
    try:
        mean = float(json.loads(results.read_text(encoding="utf-8"))["results"][task][METRIC])
        [path] = results.parent.glob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        found = {line["doc"]["id"]: Sample(line["filtered_resps"][0], float(line["exact_match"])) for line in lines}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise BackendError(f"{results} has no whole results of {task} ({error!r}).", "see its log") from error
    if len(found) != rows or not math.isclose(mean, sum(one.score for one in found.values()) / rows, abs_tol=1e-9):
        raise BackendError(f"{results}: {task} has {len(found)} of {rows} rows, or a mean not theirs.", "see its log")
    return found


def why(record: Record, sample: Sample) -> str | None:
    """Why our strict score and the sample's differ; none if they do not.

    Raises:
        BackendError: There is no explanation, so one of both is wrong.
    """
    if record.strict == sample.score and record.response == sample.response:
        return None
    if record.response != sample.response:
        return "another text"
    said, label = record.response, record.answer
    if sample.score > record.strict and _plain(said) == _plain(label):
        return "it forgives case and punctuation"
    if record.strict > sample.score and _plain(said.strip()) != _plain(said):
        return "it keeps white space around the answer"
    if record.strict > sample.score and any(_plain(said) == _plain(other) for other in record.references):
        return "it knows one label only"
    if record.strict > sample.score and record.options:
        return "it takes no letter for an option's text"
    raise BackendError(
        f"Row {record.id}: {said!r} against {label!r} scores {record.strict:g} here and {sample.score:g} there.",
        "report it with the row: one of both is wrong",
    )


def _plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def compare(records: Sequence[Record], samples: Mapping[str, Sample]) -> dict[str, Any]:
    """Both means in percent and the rows behind every difference, by reason."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if (reason := why(record, samples[record.id])) is not None:
            reasons.setdefault(reason, []).append(record.id)
    return {
        "rows": len(records),
        "ours": 100 * sum(record.strict for record in records) / len(records),
        "theirs": 100 * sum(samples[record.id].score for record in records) / len(records),
        "differences": reasons,
    }


def sheet(found: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """The comparison as a table."""
    rows = tuple(
        (
            task,
            str(entry["rows"]),
            number(entry["ours"]),
            number(entry["theirs"]),
            "\n".join(f"{len(ids)} {reason}" for reason, ids in entry["differences"].items()) or NONE,
        )
        for task, entry in found.items()
    )
    note = "Percent of the same rows: ours strict, theirs exact_match. Every row that scores differently has a reason."
    return Sheet("Beside lm-evaluation-harness", ("task", "rows", "ours", "theirs", "why"), rows, 1, note)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.delegate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", type=Path, nargs="+", help="parquet files of the data contract, one a task")
    parser.add_argument("--records", type=Path, required=True, help="what 'python -m eval' made of the same files")
    parser.add_argument("--out", type=Path, required=True, help="directory to be made")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="server that answers (default: %(default)s)")
    parser.add_argument("--model", required=True, help="name of the model there")
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment with lm-eval[api]")
    parser.add_argument("--style", choices=STYLES, default="direct", help="prompt style (default: %(default)s)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="miniature", help="prompt preset")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    server, style = Server(options.url.rstrip("/"), options.model, options.max_new_tokens), cast(Style, options.style)
    try:
        rows = {read_split(path)[0].task: read_split(path) for path in options.data}
        records = {task: read_records(record_path(options.records, task, style)) for task in rows}
        asked = {task: [row for row in rows[task] if row.id in {r.id for r in records[task]}] for task in rows}
        for examples in asked.values():
            write_task(options.out / "tasks", examples, style, options.preset, server.max_new_tokens)
        samples: dict[str, dict[str, Sample]] = {}
        # It takes tasks with pictures and tasks without in one call, and then fails.
        for name, seeing in (("pictures", True), ("text", False)):
            counts = {task: len(rows) for task, rows in asked.items() if any(row.images for row in rows) == seeing}
            if counts:
                samples |= run(options.python, counts, options.out / "tasks", options.out / name, server)
        found = {task: compare(records[task], samples[task]) for task in rows}
        write_json_atomic(options.out / "comparison.json", found)
        Console().print(sheet(found).rich())
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
