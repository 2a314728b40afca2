"""The cosine transform: against scipy, orthonormal, any shape and precision, in blocks."""

import pytest
import torch
from problems import D64
from scipy import fft

from diffusion_lab.samplers.dct import block_dct, block_idct, dct, dct_matrix, idct


def noise(*shape, dtype=D64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_matrix_is_orthogonal_and_scipys(n):
    C = dct_matrix(n)
    torch.testing.assert_close(C @ C.T, torch.eye(n, dtype=D64), rtol=0, atol=1e-13)
    x = noise(3, n)
    torch.testing.assert_close(
        dct(x, axes=1), torch.from_numpy(fft.dct(x.numpy(), norm="ortho")), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 5, 12), (2, 4, 3, 6, 4)])
@pytest.mark.parametrize(("dtype", "atol"), [(D64, 1e-13), (torch.float32, 1e-5)])
def test_images(shape, dtype, atol):
    x = noise(*shape, dtype=dtype)
    y = dct(x, axes=2)
    assert y.dtype == dtype and y.shape == x.shape
    expected = torch.from_numpy(fft.dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")).to(dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)
    torch.testing.assert_close(idct(y, axes=2), x, rtol=0, atol=atol)


def test_blocks_are_transformed_one_by_one():
    x = noise(2, 3, 8, 12)
    y = block_dct(x, 4)
    assert y.shape == (2, 3, 2, 3, 4, 4)
    # the block in the second row and third column
    torch.testing.assert_close(y[:, :, 1, 2], dct(x[:, :, 4:, 8:].contiguous(), axes=2), rtol=0, atol=1e-13)
    torch.testing.assert_close(block_idct(y), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [0, 5, 3])
def test_blocks_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match="blocks of side"):
        block_dct(noise(1, 1, 8, 12), size)


def test_a_matrix_made_in_inference_mode_may_enter_a_gradient():
    dct_matrix.cache_clear()
    with torch.inference_mode():
        dct(noise(2, 6), axes=1)
    x = noise(2, 6).requires_grad_()
    dct(x, axes=1).sum().backward()
    assert x.grad is not None
