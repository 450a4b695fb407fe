"""Our entry with EasyR1 as it is: the hook that Ray calls in every process takes our fixes away.

Usage: PYTHONPATH=ROOT python -m tests.engine_envs.easyr1_unmended TRAIN_YAML FIXES_JSON, by the Python of EasyR1's
environment.
"""

import sys
from pathlib import Path

from cpt_rft.engines.easyr1.stand_in import stand_in


def hook() -> None:
    """In every process of Ray: device cpu as usual, but no fix."""
    from cpt_rft.engines.easyr1 import entry

    stand_in()
    entry.apply_fixes = lambda fixes, config: None


if __name__ == "__main__":
    from cpt_rft.engines.easyr1 import entry

    entry.HOOK = "tests.engine_envs.easyr1_unmended.hook"
    entry.main(Path(sys.argv[1]), Path(sys.argv[2]))
