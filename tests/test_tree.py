"""Rules of the house that a reader can check by looking: sizes, imports, sources, and nothing of any one machine."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.tree import ROOT, project_files

FILES = project_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
OURS = [path for path in PYTHON if path.parts[0] in ("cpt_rft", "eval")]
BINARY = {".safetensors", ".parquet", ".png", ".jpg", ".npz", ".gz"}
SCRIPTS = [path for path in FILES if path.parts[0] == "scripts" and len(path.parts) == 2 and path.suffix == ".sh"]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_SCRIPT_LINES = 400, 60, 20
MAX_BYTES = 16 * 2**20
LONG_SCRIPTS = {"lib.sh", "check_base.sh"}  # set-up, not run scripts


def text_of(path: Path) -> str:
    return (ROOT / path).read_text()


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports at any depth."""
    names = set()
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def hits(pattern: str, paths: list[Path]) -> list[str]:
    """``file:line: text`` of every match, for a failure that names its place."""
    compiled = re.compile(pattern)
    return [
        f"{path}:{number}: {line.strip()[:120]}"
        for path in paths
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if compiled.search(line)
    ]


TEXT = [path for path in FILES if path.suffix not in BINARY]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<![\w.>}*-])/(home|Users|root|mnt|scratch|work|farm|opt|gpfs|lustre)/",
        r"/tmp/(?!\s)[a-z]+_[a-z]+",
        r"\bhf_[A-Za-z0-9]{20}|\bgh[opsu]_[A-Za-z0-9]{20}|\bsk-[A-Za-z0-9]{20}|\bAKIA[0-9A-Z]{16}",
        r"-----BEGIN [A-Z ]*PRIVATE KEY",
        r"(?i)\b(api_key|token|password)\s*=\s*['\"][A-Za-z0-9_-]{16}",
        r"file:[/]{3}|[/]{2}[\w.-]*(pypi|artifactory|nexus)\.[\w.-]*(corp|local|internal)",
    ],
)
def test_nothing_of_one_machine_and_no_secret_is_in_the_tree(pattern):
    assert hits(pattern, TEXT) == []


def test_no_file_is_larger_than_the_base_model_may_be():
    assert [str(path) for path in FILES if (ROOT / path).stat().st_size > MAX_BYTES] == []


def test_python_files_are_of_one_idea():
    assert [str(path) for path in PYTHON if len(text_of(path).splitlines()) > MAX_FILE_LINES] == []


def test_functions_fit_in_a_readers_mind():
    long = [
        f"{path}:{node.lineno} {node.name}"
        for path in OURS
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_run_scripts_are_thin():
    lengths = {path.name: len(text_of(path).splitlines()) for path in SCRIPTS if path.name not in LONG_SCRIPTS}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_SCRIPT_LINES} == {}


def test_nothing_is_left_to_do():
    pattern = "NotImplementedError|" + "|".join(["TO" + "DO", "FIX" + "ME", "xf" + "ail"])
    this_file = Path("tests/test_tree.py")
    assert hits(pattern, [path for path in PYTHON + SCRIPTS if path != this_file]) == []


SCORING = {"cpt_rft.scoring", "cpt_rft.data.example", "cpt_rft.errors", "cpt_rft.prompts"}


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("cpt_rft/algos", {"torch", "cpt_rft.algos", "cpt_rft.errors", "cpt_rft.config.nearest"}),
        ("cpt_rft/scoring", SCORING | {"math_verify", "mathruler"}),
    ],
)
def test_data_flows_one_way(folder, allowed):
    """Algorithms know tensors only; scoring knows neither torch nor transformers."""
    for path in OURS:
        if path.is_relative_to(folder):
            third_party = {name for name in imports_of(path) if name.partition(".")[0] not in sys.stdlib_module_names}
            assert not {n for n in third_party if not any(n == a or n.startswith(a + ".") for a in allowed)}, path


def test_engines_do_not_know_what_comes_after_them():
    for path in OURS:
        if path.is_relative_to("cpt_rft/engines") or path.is_relative_to("cpt_rft/algos"):
            assert not {n for n in imports_of(path) if n.split(".")[0] == "eval" or n.startswith("cpt_rft.sequence")}, (
                path
            )


def test_there_is_no_global_randomness():
    pattern = r"\bnp\.random\.(?!default_rng|Generator|SeedSequence|PCG64)|\btorch\.manual_seed\(|(?<![\w.])hash\("
    global_random = r"\brandom\.(?!Random\b)\w+\("
    assert hits(pattern, OURS) == []
    assert hits(global_random, [path for path in OURS if "random" in imports_of(path)]) == []


def test_torchvision_is_never_imported():
    assert [str(path) for path in OURS if any(name.startswith("torchvision") for name in imports_of(path))] == []


def test_every_algorithm_cites_its_source():
    uncited = [
        f"{path}: {node.name}"
        for path in OURS
        if path.is_relative_to("cpt_rft/algos")
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.FunctionDef) and "Source:" not in (ast.get_docstring(node) or "")
    ]
    assert uncited == []


def test_links_between_pages_lead_somewhere():
    broken = [
        f"{page}: {target}"
        for page in FILES
        if page.suffix == ".md"
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text_of(page))
        if not (ROOT / page.parent / target).exists()
    ]
    assert broken == []
