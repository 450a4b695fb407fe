"""The command ``cpt-rft``: one verb a line of work. Each verb imports what it needs and no more."""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from cpt_rft import __version__
from cpt_rft.errors import ConfigError, UserError

if TYPE_CHECKING:
    from cpt_rft.config.schema import Experiment
    from cpt_rft.sequence.plan import Selection
    from cpt_rft.sequence.run import Session

_OVERRIDES = """
KEY=VALUE changes a key of the experiment, as often as wanted:
  seeds=[0,1]             a key of the experiment itself
  engine.dtype=float32    a key below it
  method.lr=1e-4          of every selected method that has it
  methods.sft.lr=1e-4     of one method
  output=DIRECTORY        where the run goes
"""


class _Parser(argparse.ArgumentParser):
    """Errors as one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}.", f"see '{self.prog} --help'")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for an error of the user, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    debug = "--debug" in argv
    try:
        options = _parse(argv)
        return int(options.verb(options) or 0)
    except KeyboardInterrupt:
        print(f"\nStopped; nothing is lost. Go on with: {shlex.join(['cpt-rft', *argv])}", file=sys.stderr)
        return 130
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parse(argv: list[str]) -> argparse.Namespace:
    """Options may stand before, between and after overrides."""
    parser = build_parser(argv[0] if argv else "")
    options, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    surplus = [word for word in rest if word not in overrides]
    if surplus or (overrides and not hasattr(options, "overrides")):
        words = " ".join(surplus or overrides)
        raise ConfigError(f"command line: {words!r} is not understood.", f"see 'cpt-rft {argv[0]} --help'")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def build_parser(verb: str = "") -> argparse.ArgumentParser:
    """The command line.

    Args:
        verb: The verb about to be run; some verbs declare their own options and are imported only then.
    """
    parser = _Parser(
        prog="cpt-rft",
        description="Does reinforcement fine-tuning forget less than supervised fine-tuning, task after task?",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add(verbs, "plan", _plan, "print every stage with its parent, rows, steps and tokens, and the disk space needed")
    _add(verbs, "doctor", _doctor, "look for what would stop a run, and say what to do about it")
    _add(verbs, "run", _run, "do everything that is not done yet: prepare, train, score, report")
    _add(verbs, "status", _status, "where every stage stands")
    _add(verbs, "report", _report, "write results.json and report.html from the records, print the table")
    _add(verbs, "prepare", _prepare, "write and check the rows, nothing else")
    _add(verbs, "train", _train, "train one stage whose parent is there", stage="required")
    _add(verbs, "filter", _filter, "try the rows of one stage, and say which its filter keeps", stage="required")
    _add(verbs, "evaluate", _evaluate, "score one stage, or the base model if none is named", stage="optional")
    _add(verbs, "drift", _drift, "measure how far trained stages moved the model, and what their updates risked")
    schema = verbs.add_parser("schema", help="write the JSON Schemas of configs/ for editors")
    schema.add_argument("--out", type=Path, help="directory (default: configs/schema of this repository)")
    schema.add_argument("--debug", action="store_true", help="show the traceback of an error")
    schema.set_defaults(verb=_schema)
    for name, module, text in (
        ("data", "cpt_rft.data.command", "prepare, check, show and export real datasets"),
        ("audit", "eval.audit", "what each evaluation contract would have reported for one checkpoint"),
        ("compare", "eval.compare", "two run directories side by side: settings, and what they found"),
        ("match", "eval.matching", "choose mixtures at equal learning by a run on dev, for a run on test"),
        ("track", "eval.track", "hand the training logs and results of a run to TensorBoard or W&B"),
        ("rescore", "eval.rescore", "score stored records again under another scorer, without generating"),
        ("pretrain", "cpt_rft.miniature.pretrain", "make the miniature base model"),
        ("audit-base", "cpt_rft.miniature.audit", "print and assert what the base model can do"),
    ):
        child = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        child.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if verb == name:
            _add_module(child, module)
    return parser


def _add_module(parser: argparse.ArgumentParser, name: str) -> None:
    import importlib

    module = importlib.import_module(name)
    module.add_arguments(parser)
    parser.set_defaults(verb=module.main)


def _add(verbs: Any, name: str, verb: Callable[[argparse.Namespace], int | None], text: str, stage: str = "") -> None:
    child = verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=_OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = ", or a run directory" if name == "report" else ""
    child.add_argument("experiment", type=Path, help=f"a YAML file, or the name of one in configs/experiments{what}")
    if stage:
        child.add_argument("method", nargs=None if stage == "required" else "?", help="a method of the experiment")
        child.add_argument("task", nargs=None if stage == "required" else "?", help="a task, or 'multitask'")
        child.add_argument("--seed", type=int, help="training seed (default: the first)")
        child.add_argument("--order", type=int, default=0, help="number of the task order (default: 0)")
    elif name in ("plan", "doctor", "run", "status", "drift"):
        child.add_argument("--method", action="append", default=[], help="only this method (may be repeated)")
        child.add_argument("--seed", action="append", type=int, default=[], help="only this seed (may be repeated)")
        child.add_argument(
            "--order", action="append", type=int, default=[], help="only this task order (may be repeated)"
        )
    if name == "filter":
        child.add_argument("--keep-text", action="store_true", help="write down the text of every try too")
    if name in ("run", "drift"):
        child.add_argument("--task", help="go no further than this task")
    if name == "run":
        child.add_argument("--rerun-stale", action="store_true", help="make stages anew that other code made")
    if name == "plan":
        child.add_argument(
            "--stages", action="store_true", help="print nothing but the names of the stages of a sequence"
        )
    if name == "status":
        child.add_argument("--verify", action="store_true", help="read and hash every file")
    if name in ("plan", "doctor", "status"):
        child.add_argument("--json", action="store_true", help="print JSON")
    child.add_argument("--debug", action="store_true", help="show the traceback of an error")
    child.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change keys of the experiment (see below)")
    child.set_defaults(verb=verb)


def _experiment(options: argparse.Namespace, methods: Sequence[str] = ()) -> "Experiment":
    from cpt_rft.config.load import load_experiment

    return load_experiment(options.experiment, options.overrides, methods)


def _selection(options: argparse.Namespace) -> "Selection":
    from cpt_rft.sequence.plan import Selection

    task = getattr(options, "task", None)
    return Selection(tuple(options.method), tuple(options.order), tuple(options.seed), task)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(*renderables: object) -> None:
    from rich.console import Console

    # A pipe has no width: lines are then left whole.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, soft_wrap=True)
    for renderable in renderables:
        console.print(renderable)


def _plan(options: argparse.Namespace) -> None:
    from cpt_rft.sequence.status import plan, plan_table

    experiment = _experiment(options, options.method)
    selection = _selection(options)
    if options.stages:
        chain = selection.chains(experiment, Path(experiment.output))[0]
        print("\n".join(stage.name for stage in chain.stages))
    elif options.json:
        print(json.dumps(plan(experiment, selection), indent=2))
    else:
        _print(*plan_table(plan(experiment, selection)))


def _doctor(options: argparse.Namespace) -> int:
    from cpt_rft.sequence.doctor import as_json, examine

    findings = examine(_experiment(options, options.method), _selection(options))
    if options.json:
        print(json.dumps(as_json(findings), indent=2))
    else:
        for finding in findings:
            fix = f" Fix: {finding.fix}" if finding.fix else ""
            print(f"{finding.word:8}{finding.what}: {finding.text}{fix}")
    return 2 if any(finding.word == "problem" for finding in findings) else 0


def _run(options: argparse.Namespace) -> None:
    from cpt_rft.sequence.run import open_session, run_experiment

    experiment, selection = _experiment(options, options.method), _selection(options)
    with open_session(experiment, _say, debug=options.debug) as session:
        if not run_experiment(session, selection, rerun_stale=options.rerun_stale):
            _say("everything is done already")
        _show_results(session, force=False)


def _show_results(session: "Session", *, force: bool) -> None:
    from cpt_rft.sequence.run import write_results
    from eval.runs import IncompleteRunError
    from eval.table import terminal

    try:
        results = write_results(session, force=force)
    except IncompleteRunError:
        if force:
            raise
        _say("no sequence is complete yet, so there is no report")
        return
    _print(terminal(results))
    _say(f"results: {session.run.directory / 'results.json'}")
    _say(f"report:  {session.run.directory / 'report.html'}")


def _report(options: argparse.Namespace) -> None:
    if (options.experiment / "config.json").is_file():
        _report_directory(options.experiment, options.overrides)
        return
    from cpt_rft.sequence.run import open_session

    with open_session(_experiment(options), _say, debug=options.debug) as session:
        _show_results(session, force=True)


def _report_directory(run: Path, overrides: Sequence[str]) -> None:
    """A run directory by itself: nothing but its records, logs and configuration is read."""
    from eval import results as builder
    from eval.report import EXPORT_NAME, REPORT_NAME, write_report
    from eval.table import terminal

    if overrides:
        raise ConfigError(
            f"command line: {overrides[0]!r} would change nothing in {run}.", "name the experiment instead"
        )
    results = builder.write_results(run, partial=True)
    write_report(run, results)
    _print(terminal(results))
    for name in (builder.RESULTS_NAME, REPORT_NAME, EXPORT_NAME):
        _say(f"written: {run / name}")


def _status(options: argparse.Namespace) -> int:
    from cpt_rft.sequence.status import status, status_table

    result = status(_experiment(options, options.method), _selection(options), verify=options.verify)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        table, lines = status_table(result)
        _print(table, *lines)
    return 2 if result["problems"] else 0


def _prepare(options: argparse.Namespace) -> None:
    from cpt_rft.sequence.run import prepare_only

    for key, rows in prepare_only(_experiment(options), _say).rows.items():
        print(f"{key}: {rows} rows")


def _train(options: argparse.Namespace) -> None:
    from cpt_rft.sequence.run import open_session, train_one

    experiment = _experiment(options, [options.method])
    with open_session(experiment, _say, debug=options.debug) as session:
        seed = experiment.seeds[0] if options.seed is None else options.seed
        stage = train_one(session, options.method, options.task, options.order, seed)
        _say(f"trained: {stage.directory}")


def _filter(options: argparse.Namespace) -> None:
    from cpt_rft.methods.instances import KEPT_NAME, TRIES_NAME
    from cpt_rft.sequence.run import filter_one, open_session

    experiment = _experiment(options, [options.method])
    with open_session(experiment, _say, debug=options.debug) as session:
        seed = experiment.seeds[0] if options.seed is None else options.seed
        asked = (options.method, options.task, options.order, seed)
        place, kept = filter_one(session, *asked, keep_text=options.keep_text)
    print(f"tried by {kept['source']}")
    for task, counts in kept["tasks"].items():
        share = counts["kept"] / counts["rows"]
        print(f"{task}: {counts['rows']} rows, {counts['solvable']} solvable, {counts['kept']} kept ({share:.1%})")
    for name, ids in kept["controls"].items():
        print(f"control {name}: {len(ids)} rows")
    _say(f"kept ids and controls: {place / KEPT_NAME}")
    _say(f"every row:             {place / TRIES_NAME}")


def _evaluate(options: argparse.Namespace) -> None:
    from cpt_rft.sequence.run import evaluate_base, evaluate_one, open_session

    if options.method is not None and "=" in options.method:  # no stage, overrides only
        words = [word for word in (options.method, options.task) if word is not None]
        options.overrides, options.method, options.task = [*words, *options.overrides], None, None
    if options.method is not None and options.task is None:
        raise ConfigError("command line: a stage is a method and a task.", "name both, or neither for the base model")
    experiment = _experiment(options, [options.method] if options.method else ())
    with open_session(experiment, _say, debug=options.debug) as session:
        if options.method is None:
            evaluate_base(session)
            _say(f"scored: {session.run.base_directory / 'eval'}")
            return
        seed = experiment.seeds[0] if options.seed is None else options.seed
        stage = evaluate_one(session, options.method, options.task, options.order, seed)
        _say(f"scored: {stage.directory / 'eval'}")


def _drift(options: argparse.Namespace) -> None:
    from cpt_rft.sequence.run import measure_drift, open_session

    experiment, selection = _experiment(options, options.method), _selection(options)
    with open_session(experiment, _say, debug=options.debug) as session:
        if not measure_drift(session, selection):
            _say("everything that is trained is measured already")
        _show_results(session, force=False)


def _schema(options: argparse.Namespace) -> None:
    from cpt_rft.config.json_schema import DIRECTORY, write_schemas

    for path in write_schemas(options.out or DIRECTORY):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
