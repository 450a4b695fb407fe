"""Trains pickled stages, one after the other, by the engines that they name, and prints each log as a line of JSON.

Usage: train_stage.py FILE[@STEP]..., with the project in PYTHONPATH; what reports STEP is killed there.
"""

import json
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

from tests.helpers.engine import run
from tests.helpers.killed import train_and_die

if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, _, step = argument.partition("@")
        stage = pickle.loads(Path(name).read_bytes())
        if step:
            train_and_die(stage, int(step))
        else:
            print(json.dumps([asdict(line) for line in run(stage)]))
