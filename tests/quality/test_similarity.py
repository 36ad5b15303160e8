"""How similar images are, and what is done where LPIPS cannot be had."""

import importlib.util
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchmetrics.image.lpip

from skipvar.quality.similarity import find_lpips, psnr, ssim

MEASURE = "LearnedPerceptualImagePatchSimilarity"


class Distance:
    """Stands for the network, whose weights cannot be fetched here. Its state must not grow."""

    def __init__(self, **_: object) -> None:
        self.kept: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        assert images.shape[1] == 3 and images.min() >= 0 and images.max() <= 1
        self.kept.append((images - references).abs().mean((1, 2, 3)).squeeze())  # as torchmetrics: a scalar for one
        assert len(self.kept) == 1
        return self.kept[0]

    def reset(self) -> None:
        self.kept.clear()


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def test_equal_images_are_alike() -> None:
    images = pictures(2)
    assert ssim(images, images) == pytest.approx([1, 1]) and np.isinf(psnr(images, images)).all()


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_without_torchvision_there_is_no_lpips() -> None:
    assert find_lpips() is None


def test_without_weights_there_is_no_lpips_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(**_: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchmetrics.image.lpip, MEASURE, unreachable)
    assert find_lpips() is None
    assert "AlexNet's weights (<urlopen error no network>)" in caplog.text


@pytest.mark.parametrize("count", [1, 3])
def test_lpips_is_a_number_for_each_pair(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torchmetrics.image.lpip, MEASURE, Distance)
    lpips = find_lpips()
    assert lpips is not None
    images = pictures(count)
    for _ in range(2):
        found = lpips(images, np.zeros_like(images))
        assert found == pytest.approx(images.mean((1, 2, 3)) / 255, rel=1e-5)
