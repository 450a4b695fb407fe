"""Point the client libraries of a process at a fixture hub.

A user sets HF_ENDPOINT and HF_HOME, which the libraries read once, when they are imported: `environment` is for a new
process. Tests share a process that has imported them long ago: `connect` sets the constants that they were read into.
"""

import os
from pathlib import Path

import pytest

from tests.helpers.hub.server import Hub


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The variables of a new process that knows no other hub."""
    return os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def connect(hub: Hub, home: Path, patch: pytest.MonkeyPatch, *, offline: bool = False) -> None:
    """Make this process use the hub, with an empty cache in ``home``; ``offline`` as HF_HUB_OFFLINE would."""
    import datasets.config
    import huggingface_hub
    from huggingface_hub import constants, hf_file_system

    from cpt_rft.data import hub as client
    from cpt_rft.data import site
    from cpt_rft.data.retry import Patience

    patch.setenv("NO_PROXY", "127.0.0.1,localhost")
    patch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    for module in (constants, datasets.config):
        patch.setattr(module, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    patch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", offline, raising=False)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    hf_file_system.HfFileSystem.clear_instance_cache()
    quick = Patience(attempts=4, base_s=0.01, longest_s=0.05)
    patch.setattr(client, "PATIENCE", quick)
    patch.setattr(site, "PATIENCE", quick)
