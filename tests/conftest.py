"""Settings of every test: threads and hypothesis profiles."""

import os

import torch
from hypothesis import HealthCheck, settings

# Each xdist worker is one process of several on the same cores: threads of its own would only wait for each other's.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# No deadline anywhere: a first call that compiles or reads a file is slow without being wrong.
settings.register_profile("default", deadline=None)
# Continuous integration draws the same examples every time, so that a failure there is a change's and not the day's.
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


def pytest_runtest_setup() -> None:
    """Every test begins at the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)
