"""What may not be in EasyR1's environment: combinations that are known to fail, late and for no visible reason.

Usage: python -m cpt_rft.engines.easyr1.packages, by the Python of that environment.
"""

import sys
from collections.abc import Mapping
from importlib.metadata import distributions

from cpt_rft.engines.easyr1 import VERSION
from cpt_rft.errors import ConfigError

_MAKE = "make the environment again with 'bash scripts/setup_easyr1.sh'"


def check_packages(versions: Mapping[str, str]) -> None:
    """Refuse an environment that EasyR1 is known not to work in.

    Args:
        versions: Version of every package by its normalised name.

    Raises:
        ConfigError: The first combination that fails, with what to install.
    """
    if versions.get("verl") != VERSION:
        found = f"verl {versions['verl']} is installed, another package" if "verl" in versions else "it is missing"
        raise ConfigError(f"EasyR1's package is called verl and has version {VERSION}; {found}.", _MAKE)
    if _release(versions.get("omegaconf", "0")) >= (2, 4):
        raise ConfigError(
            f"omegaconf {versions['omegaconf']} refuses EasyR1's list of loggers (TupleConfig).",
            "install omegaconf==2.3.0 in that environment",
        )
    if not (4, 54) <= _release(versions.get("transformers", "0")) < (5,):
        raise ConfigError(
            f"EasyR1 needs transformers from 4.54 to below 5, not {versions.get('transformers', 'none')}.",
            "install transformers==4.56.2 in that environment",
        )
    if "vllm" in versions and _release(versions["vllm"])[:2] != (0, 11):
        raise ConfigError(
            f"EasyR1 reaches into vllm 0.11 and fails with {versions['vllm']} (disable_mm_preprocessor_cache).",
            "install vllm==0.11.0 with torch==2.8.0 in that environment",
        )
    if "deepspeed" in versions:
        raise ConfigError(
            f"With deepspeed {versions['deepspeed']} beside it EasyR1 stops with '0 active drivers'.",
            "uninstall deepspeed from that environment; the engine llamafactory has one of its own",
        )


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version.

    >>> _release("2.4.0.dev3"), _release("0.11.0+cu129")
    ((2, 4, 0), (0, 11, 0))
    """
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def main() -> int:
    """Check this very environment."""
    found = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in distributions()}
    try:
        check_packages(found)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
