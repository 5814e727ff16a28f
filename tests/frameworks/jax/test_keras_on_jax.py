"""Keras on JAX: what is asserted stands in `keras_on_jax.py`, which runs in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_keras_on_jax():
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("keras_on_jax.py")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
