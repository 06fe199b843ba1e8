"""Arrays from and to PyTorch, words of options, versions."""

import ml_dtypes
import numpy as np
import pytest
import torch

from tvm_balanced.errors import InputError
from tvm_balanced.support.provenance import package_version, package_versions
from tvm_balanced.support.tensors import to_numpy, to_torch
from tvm_balanced.support.words import check_word


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_arrays_go_to_pytorch_and_back(dtype):
    tensor = torch.tensor([[1.5, -2.0, 3.25], [0.0, 1e4, -7.0]]).to(dtype).T
    array = to_numpy(tensor.requires_grad_() if dtype.is_floating_point else tensor)
    assert array.dtype == np.dtype(str(dtype).partition(".")[2])
    np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double().numpy())
    back = to_torch(array)
    assert back.dtype is dtype and torch.equal(back, tensor)
    array[0, 0] = 9
    assert back[0, 0] != 9


def test_sparse_tensors_become_dense_ones():
    tensor = torch.eye(3).to_sparse()
    np.testing.assert_array_equal(to_numpy(tensor), np.eye(3))
    assert to_numpy(torch.zeros(0, 2, dtype=torch.bfloat16)).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("value", "allowed", "message"),
    [
        ("c", ("a", "b"), '^dense "c" is not known; choose a or b$'),
        (3, ("a", "b", "c"), "^dense 3 is not known; choose a, b or c$"),
        ([], ("a",), r"^dense \[\] is not known; choose a$"),
    ],
)
def test_words(value, allowed, message):
    assert check_word("dense", "a", allowed) == "a"
    with pytest.raises(InputError, match=message):
        check_word("dense", value, allowed)


def test_versions():
    assert package_version("no-such-package") is None
    assert package_versions(["numpy", "no-such-package"]) == {"numpy": np.__version__}
