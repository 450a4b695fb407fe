"""The virtual environment of a framework: where it is, and what is in it."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

from cpt_rft.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
DEEPSPEED_FILES = REPOSITORY / "configs" / "engines" / "deepspeed"
LOCKS = REPOSITORY / "scripts" / "engine_envs"
# Of the interpreter, the launcher and the build; what a user's shell sets would reach into the environment.
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX")
_LIST = (
    "import json; from importlib.metadata import distributions as d;"
    "print(json.dumps({x.metadata['Name'].lower().replace('_', '-'): x.version for x in d()}))"
)


def lock_of(framework: str) -> Path:
    """The file that names every package of a framework's environment."""
    return LOCKS / f"{framework}.lock"


def find_environment(framework: str, named: str | None, *, lock: str | None = None) -> Path:
    """The environment of a framework.

    Args:
        framework: Its name.
        named: What the configuration says; none for the environment that the set-up script makes.
        lock: Name of its lock, where the framework has several; none for its own name.

    Raises:
        ConfigError: There is none.
    """
    if named is not None:
        path = Path(named).expanduser().absolute()
    else:
        root = Path(os.environ.get("CPT_RFT_ENVS") or REPOSITORY / ".envs")
        lock = lock or framework
        path = root.absolute() / f"{lock}-{hashlib.sha256(lock_of(lock).read_bytes()).hexdigest()[:12]}"
    if not (path / "bin" / "python").exists() or (named is None and not (path / "ready").is_file()):
        raise ConfigError(
            f"The environment of {framework} is not at {path}.",
            f"make it with 'bash scripts/setup_{framework}.sh', or name another: engine.environment=DIRECTORY,"
            " or rft_engine.environment=DIRECTORY for an rft_engine",
        )
    return path


def environment_variables(environment: Path) -> dict[str, str]:
    """This process's variables with the environment's programs first and nothing of another one."""
    kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    path = f"{environment / 'bin'}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**kept, "PATH": path, "VIRTUAL_ENV": str(environment), "PYTHONNOUSERSITE": "1"}


def installed_versions(environment: Path) -> dict[str, str]:
    """Version of every package in an environment, by its normalised name."""
    command = [str(environment / "bin" / "python"), "-I", "-c", _LIST]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def locked_versions(framework: str) -> dict[str, str]:
    """Version of every package in a lock, by its normalised name."""
    lines = lock_of(framework).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip().lower().replace("_", "-"): version.strip() for name, version in pairs}
