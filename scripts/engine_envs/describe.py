"""Says which packages an environment holds, and from where.

Usage: python -I describe.py PACKAGE...
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution


def describe(package: str) -> str:
    """Name, version, and the folder if it is installed from one."""
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return f"{package}: not installed"
    origin = found.read_text("direct_url.json") or ""
    return f"{package} {found.version}" + (" (from this checkout)" if '"editable": true' in origin else "")


if __name__ == "__main__":
    print(f"{sys.prefix}: " + ", ".join(describe(package) for package in sys.argv[1:]))
