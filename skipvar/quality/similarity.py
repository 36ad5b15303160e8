"""How similar two images are: SSIM as torchmetrics computes it, image by image."""

import numpy as np
import torch


def ssim(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Structural similarity of image pairs: two `(B, H, W, 3)` uint8 -> `(B,)` float32, 1 for equal images.

    torchmetrics' defaults: Gaussian window of 11 pixels with sigma 1.5, k1 = 0.01, k2 = 0.03, data range 255.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    def planes(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).permute(0, 3, 1, 2).float()

    value = structural_similarity_index_measure(planes(images), planes(references), reduction="none", data_range=255.0)
    assert isinstance(value, torch.Tensor)
    return value.reshape(-1).numpy()
