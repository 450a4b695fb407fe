"""The files of the project as a clone would have them."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_OURS = {"EasyR1", "LLaMA-Factory"}
GENERATED = {"runs", "build", "dist", "htmlcov", "__pycache__"}


def project_files(root: Path = ROOT) -> list[Path]:
    """Relative paths of what git tracks or would track; in a folder without git, of all but the generated files."""
    if (root / ".git").exists():
        listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, capture_output=True, check=True, text=True).stdout.split("\0")
        paths = [Path(name) for name in names if name and (root / name).is_file()]
    else:
        every = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        paths = [path for path in every if not any(_generated(part) for part in path.parts[:-1])]
    return sorted(path for path in paths if path.parts[0] not in NOT_OURS)


def copy_tree(target: Path, source: Path = ROOT) -> None:
    """Write a copy of the project to `target`, without anything that git ignores."""
    for path in project_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / path, target / path)


def _generated(part: str) -> bool:
    return part in GENERATED or part.endswith(".egg-info") or (part.startswith(".") and part != ".ci")
