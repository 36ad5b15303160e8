"""How similar two images are: SSIM and PSNR as torchmetrics computes them, image by image."""

import numpy as np
import torch


def ssim(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Structural similarity of image pairs: two `(B, H, W, 3)` uint8 -> `(B,)` float32, 1 for equal images.

    torchmetrics' defaults: Gaussian window of 11 pixels with sigma 1.5, k1 = 0.01, k2 = 0.03, data range 255.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(
        _planes(images), _planes(references), reduction="none", data_range=255.0
    )
    assert isinstance(value, torch.Tensor)
    return value.reshape(-1).numpy()


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Peak signal to noise ratio of image pairs in dB: two `(B, H, W, 3)` uint8 -> `(B,)` float32, infinite for equal
    images."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    value = peak_signal_noise_ratio(
        _planes(images), _planes(references), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    return value.numpy()


def _planes(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).permute(0, 3, 1, 2).float()
