"""What every test may rely on: nothing leaks from one to the next."""

import os

import pytest
import torch

collect_ignore = ["frameworks/jax/keras_on_jax.py"]  # it chooses a backend for the whole process

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def no_global_state_leaks():
    """Fail a test that leaves the process other than it found it."""
    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_rng_state()
    torch.manual_seed(0)
    yield
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == before[:2]
    torch.set_rng_state(before[2])
