"""Fixed random numbers and one thread for every kernel test: small shapes are slower on several."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed_one_thread():
    torch.manual_seed(20)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
