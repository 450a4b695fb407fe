"""Repairs an engine environment on a machine without CUDA; does nothing where the packages import as they are.

Run by the environment's own Python. Only two faults are known and repaired, both of wheels built for CUDA beside
a CPU build of torch: torchvision (see ``torchvision_cpu_shim.py``) and torchaudio, which imports in pure Python
once its compiled files, which cannot load anyway, are gone.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


def imports(package: str) -> bool:
    """Whether the package imports in a fresh interpreter."""
    return subprocess.run([sys.executable, "-I", "-c", f"import {package}"], capture_output=True).returncode == 0


def installed_and_broken(package: str) -> bool:
    """Whether the package is there but does not import."""
    return importlib.util.find_spec(package) is not None and not imports(package)


def main() -> None:
    """Repair, then check that the repair worked."""
    site = Path(sysconfig.get_path("purelib"))
    repaired = []
    if installed_and_broken("torchvision"):
        shutil.copyfile(Path(__file__).with_name("torchvision_cpu_shim.py"), site / "torchvision_cpu_shim.py")
        (site / "torchvision_cpu_shim.pth").write_text("import torchvision_cpu_shim\n", encoding="utf-8")
        repaired.append("torchvision")
    if installed_and_broken("torchaudio"):
        for library in (site / "torchaudio").rglob("*.so"):
            library.unlink()
        repaired.append("torchaudio")
    for package in repaired:
        if not imports(package):
            sys.exit(f"{package} does not import in {site}, even with the CPU shim.")
        print(f"CPU shim: {package} was built for CUDA; made importable in {site}")


if __name__ == "__main__":
    main()
