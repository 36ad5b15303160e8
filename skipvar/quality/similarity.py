"""How similar two images are: SSIM, PSNR and LPIPS as torchmetrics computes them, image by image."""

import logging
from collections.abc import Callable

import numpy as np
import torch

logger = logging.getLogger(__name__)


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


def find_lpips() -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """LPIPS (arXiv 1801.03924, on AlexNet) of image pairs: two `(B, H, W, 3)` uint8 -> `(B,)` float32, 0 for equal
    images.

    None where torchvision is not installed, or AlexNet's weights, which it fetches once, cannot be had (a warning).
    Images are at least 64 pixels wide and high.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        measure = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True, reduction="none")
    except ModuleNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        logger.warning("No LPIPS: torchvision has not got AlexNet's weights (%s)", error)
        return None

    def lpips(images: np.ndarray, references: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            value = measure(_planes(images) / 255.0, _planes(references) / 255.0)
        measure.reset()  # it would keep every value that it ever returned
        found: np.ndarray = value.reshape(-1).numpy()
        return found

    return lpips


def _planes(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).permute(0, 3, 1, 2).float()
