"""The commands that the quickstart's report shows train what the quickstart trained."""

import subprocess
import sys

from tests.launch.test_commands import ROOT, alone

# In a process of its own: a script's flags are global.
CHECK = """
import shlex, sys
from pathlib import Path
from absl import flags
from ml_collections import config_flags
from configs import quickstart as recipes
from launch import quickstart

flags.FLAGS(sys.argv)
out = Path(quickstart.OUT.value)
for mode in recipes.STEPS:
    by_hand = flags.FlagValues()
    held = config_flags.DEFINE_config_file("config", flag_values=by_hand)
    sys.argv = ["train.py", *shlex.split(quickstart._recipe(mode, out))]  # where config_flags looks for overrides
    by_hand(sys.argv)
    assert held.value == quickstart.scaled(mode, out), mode
    if out == Path(recipes.FOLDER) and quickstart.BUDGET.value == 1:
        assert quickstart._recipe(mode, out) == f"--config=configs/quickstart.py:{mode}"
print("alike")
"""


def alike(*arguments) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *arguments], cwd=ROOT, env=alone(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "alike"


def test_recipes_by_hand_are_those_that_were_run(tmp_path):
    assert alike()
    assert alike("--budget=0.05", f"--out={tmp_path}/a folder")
