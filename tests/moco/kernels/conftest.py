"""Kernels are compiled once; tests of those this processor has none of are left out."""

import pytest
import torch

from moco.errors import ConfigError
from moco.kernels.compiler import compile_kernels, has_kernel


@pytest.fixture(scope="session", autouse=True)
def compiled():
    try:
        compile_kernels()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    """Types of the convolutions' kernels."""
    name = str(request.param).removeprefix("torch.")
    if not has_kernel("convolution", f"convolution_{name}"):
        pytest.skip(f"convolutions have no kernels for {name} on this processor")
    return request.param
