"""Keras with torch as its backend, which a process chooses once: `on_torch.py` in one of its own."""

import os
import subprocess
import sys
from pathlib import Path


def test_all_verbs_on_torch():
    file = Path(__file__).with_name("on_torch.py")
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "tensorflow" not in done.stdout
