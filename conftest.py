"""What pytest leaves alone when it reads the doctests of the library."""

import importlib.util

if importlib.util.find_spec("verl") is None:  # only EasyR1's environment has it
    collect_ignore = [f"cpt_rft/engines/easyr1/{name}.py" for name in ("cpu_batch", "cpu_worker", "entry")]
