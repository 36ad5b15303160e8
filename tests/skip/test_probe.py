"""The probe: each image's numbers are its own, and they are what FORWARD.md section 9 says."""

import math

import numpy as np
import torch
from torch import Tensor

from skipvar.skip.features import LATENT_CELLS, LatentProbe
from skipvar.skip.probe import fft_high_frequency_ratio, small_latents, sobel_change, take_probe


def decode(small: Tensor) -> Tensor:
    """Three channels out of four, twice as large; each image by itself."""
    return small[:, :3].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).tanh()


def test_a_probe_in_a_batch_is_the_probe_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    for grid in ((8, 8), (9, 6), (6, 11), (16, 16), (20, 16)):
        old, new = torch.randn(2, 5, 4, 3 * grid[0], 3 * grid[1], generator=generator)
        together = take_probe(decode, old, new, grid)
        for index in range(5):
            assert take_probe(decode, old[index : index + 1], new[index : index + 1], grid) == [together[index]]


def test_sobel_against_a_loop() -> None:
    old, new = (2 * torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(1)) - 1).numpy()

    def magnitude(image: np.ndarray) -> np.ndarray:
        padded, out = np.pad(image.astype(np.float64), 1), np.zeros(image.shape)
        kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
        for row in range(image.shape[0]):
            for column in range(image.shape[1]):
                window = padded[row : row + 3, column : column + 3]
                out[row, column] = math.hypot((window * kernel).sum(), (window * kernel.T).sum())
        return out

    ours = sobel_change(torch.from_numpy(old)[None], torch.from_numpy(new)[None]).item()
    assert math.isclose(ours, np.abs(magnitude(new) - magnitude(old)).mean(), rel_tol=1e-5)


def test_equal_images_do_not_change() -> None:
    image = torch.rand(2, 16, 16)
    assert torch.equal(sobel_change(image, image), torch.zeros(2))


def test_fft_ratio_of_waves() -> None:
    """A wave within the radius counts nothing, one beyond it everything: 25 of 128 is the border."""
    positions = torch.arange(128, dtype=torch.float64)
    slow, border, fast = (torch.cos(2 * math.pi * count * positions / 128).repeat(128, 1) for count in (24, 25, 26))
    ratios = fft_high_frequency_ratio(torch.stack([slow, border, fast]).float())
    assert ratios[0] < 1e-3 and ratios[1] < 1e-3 and ratios[2] > 0.999


def test_fft_ratio_against_numpy_on_odd_sizes() -> None:
    for height, width in ((9, 6), (128, 96), (15, 15)):
        gray = np.random.default_rng(height).normal(size=(height, width)).astype(np.float32)
        amplitude = np.abs(np.fft.fftshift(np.fft.fft2(gray)))
        rows, columns = np.ogrid[:height, :width]
        distance = np.hypot(rows - height // 2, columns - width // 2)
        expected = amplitude[distance > int(0.4 * min(height, width) / 2)].sum() / (amplitude.sum() + 1e-6)
        assert math.isclose(fft_high_frequency_ratio(torch.from_numpy(gray)[None]).item(), expected, rel_tol=1e-5)


def test_the_small_latents_are_means_of_cells_row_by_row() -> None:
    code_sum = torch.arange(2 * 8 * 8, dtype=torch.float32).view(1, 2, 8, 8)
    (found,) = small_latents(code_sum)
    assert found == [
        float(code_sum[0, channel, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean())
        for channel in range(2)
        for row in range(LATENT_CELLS)
        for column in range(LATENT_CELLS)
    ]
    quarters = [(c, y, x) for c in range(2) for y in range(2) for x in range(2)]
    halves = [float(code_sum[0, c, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean()) for c, y, x in quarters]
    assert LatentProbe(4).pick(found) == tuple(found) and list(LatentProbe(2).pick(found)) == halves
    assert list(LatentProbe(1).pick(found)) == [float(code_sum[0, c].mean()) for c in (0, 1)]
