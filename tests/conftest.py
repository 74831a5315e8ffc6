"""Settings of all tests: hypothesis draws the same examples each time, unless HYPOTHESIS_PROFILE=wide."""

import os

import torch
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=30, derandomize=True, **_COMMON)
settings.register_profile("wide", max_examples=300, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# One thread for each worker of pytest-xdist: threads that wait for a core which another process has cost tenfold.
torch.set_num_threads(1)
