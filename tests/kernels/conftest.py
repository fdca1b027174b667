"""Fixed random numbers and one thread for every kernel test: small shapes are slower on several."""

from __future__ import annotations

import pytest
import torch

from rag_kernels.native import load_library


@pytest.fixture(autouse=True)
def _fixed_seed_one_thread():
    torch.manual_seed(20)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _compiled_kernel_where_it_can_be_built(request):
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if parameters.get("kernel") == "cpp" and load_library() is None:
        pytest.skip("the C++ kernels cannot be built on this machine")
