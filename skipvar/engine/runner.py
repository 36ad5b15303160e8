"""Executes what the batcher picked: owns the working cache and the slots of images that wait."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skipvar.engine.memory import BRANCHES, MemoryPlan
from skipvar.engine.sampler import Sampler, WorkingBatch
from skipvar.engine.state import ImageState
from skipvar.model.bsq import latent_grid
from skipvar.model.kv_cache import SlotStore
from skipvar.model.pipeline import to_uint8
from skipvar.skip.probe import small_latents, take_probe
from skipvar.skip.strategy import Mode, Strategy, num_scales_run
from skipvar.types import Probe


@dataclass(frozen=True)
class Suffix:
    """What a strategy's suffix made of a batch."""

    code_sum: Tensor
    """`(B, dv, h, w)` float32."""
    is_finite: Sequence[bool]
    seconds: float
    """Of its own scales, whoever shared them, for the whole batch."""


class Runner:
    """One model with its preallocated memory. Not thread-safe: one engine thread drives it.

    Any method may run out of memory (`torch.OutOfMemoryError`): slots are then held by those who held them before, and
    images that were being run have to be restored to their snapshots.
    """

    def __init__(self, sampler: Sampler, plan: MemoryPlan, *, slot_tokens: int) -> None:
        self.sampler, self.plan = sampler, plan
        self.decode_images = plan.decode_images
        """Images that are decoded together, at most."""
        self._cache = sampler.new_cache(plan.cache_tokens)
        self._slots = SlotStore(like=self._cache, slots=plan.pool_images, branches=BRANCHES, tokens=slot_tokens)
        self._free_slots = list(reversed(range(plan.pool_images)))

    def run_whole(self, images: Sequence[ImageState], modes: Sequence[Mode], limit: int) -> None:
        """All scales of images whose strategy is known before they start."""
        self._run(self._begin(images, limit, num_scales_run(modes) - 1), modes)

    def run_prefix(
        self, images: Sequence[ImageState], decision_scale: int, limit: int, *, goes_on: bool = False
    ) -> WorkingBatch:
        """The scales up to and with the decision scale; the batch's keys and values stay in the working cache.

        `goes_on`: with room there for the scales that follow.
        """
        num_written = images[0].schedule.num_scales - 1 if goes_on else decision_scale + 1
        batch = self._begin(images, limit, num_written)
        modes = [Mode.GUIDED] * (decision_scale + 1)
        self._run(batch, modes, keep_last=True, keep_sums=range(max(0, decision_scale - 2), decision_scale + 1))
        return batch

    def run_suffixes(self, batch: WorkingBatch, strategies: Sequence[Strategy]) -> dict[str, Suffix]:
        """Every strategy's suffix of a batch whose prefix `goes_on`: a scale that several share runs once.

        Guided branches come first, so that the unconditional rows are dropped once and never wanted again.
        """
        found: dict[str, Suffix] = {}

        def grow(members: Sequence[Strategy], seconds: float) -> None:
            scale = batch.scale
            for strategy in members:
                if strategy.num_scales_run == scale:
                    is_finite = batch.is_finite[: len(batch.images)].tolist()
                    found[strategy.name] = Suffix(batch.code_sum[: len(batch.images)], is_finite, seconds)
            here = batch.mark()
            for mode in (Mode.GUIDED, Mode.CONDITIONAL):
                same = [one for one in members if one.num_scales_run > scale and one.modes[scale] is mode]
                if not same:
                    continue
                start = time.perf_counter()
                self.sampler.step(batch, mode, write=any(one.num_scales_run > scale + 1 for one in same))
                batch.is_finite.tolist()  # waits for the device: the clock is to see the whole step
                grow(same, seconds + time.perf_counter() - start)
                batch.rewind(here)

        grow(strategies, 0.0)
        return found

    def probe(self, batch: WorkingBatch, decision_scale: int, grid_scale: int) -> list[Probe]:
        """The probe of each image of a prefix batch; waits for the device."""
        pipeline = self.sampler.pipeline
        grids = batch.images[0].schedule.grids
        grid = latent_grid(grids[grid_scale], pipeline.config.transformer.spatial_patchify)
        full_cells, small_cells = batch.code_sum[0, 0].numel(), grid[0] * grid[1]
        old, new = batch.history[decision_scale - 1], batch.history[decision_scale]
        num_together = max(1, self.decode_images * full_cells // small_cells)

        def decode(sums: Tensor) -> Tensor:
            """As many cells at a time as the images have that are decoded together."""
            return torch.cat([pipeline.decode(part) for part in sums.split(num_together)])

        return take_probe(decode, old, new, grid)[: len(batch.images)]

    def latents(self, batch: WorkingBatch, scale: int) -> list[list[float]]:
        """The code sum of each image of a prefix batch at a scale, as a small picture; waits for the device."""
        return small_latents(batch.history[scale])[: len(batch.images)]

    def hold(self, batch: WorkingBatch, indices: Sequence[int]) -> None:
        """Moves images of a prefix batch, by their places in it, to slots."""
        slots = self._free_slots[len(self._free_slots) - len(indices) :]
        self._slots.store(slots, batch.cache, indices, branches=1 + batch.is_guided)
        # The slots are taken only now, when nothing can fail any more.
        del self._free_slots[len(self._free_slots) - len(indices) :]
        for index, slot in zip(indices, slots, strict=True):
            batch.images[index].slot = slot

    def run_suffix(self, images: Sequence[ImageState], decision_scale: int, modes: Sequence[Mode], limit: int) -> None:
        """The scales after the decision scale, for images that share their modes. Their slots stay theirs."""
        slots = [image.slot for image in images if image.slot is not None]
        members = [*slots, *([slots[0]] * (self._size(images, limit) - len(slots)))]
        first = decision_scale + 1
        is_guided = images[0].is_guided and modes[first] is Mode.GUIDED
        schedule = images[0].schedule
        self._slots.load(
            members,
            self._cache,
            branches=1 + is_guided,
            length=schedule.first_token(first),
            num_tokens=schedule.first_token(num_scales_run(modes) - 1),
        )
        batch = self.sampler.begin(images, self._cache, scale=first, is_guided=is_guided, size=len(members))
        self._run(batch, modes)

    def release(self, image: ImageState) -> None:
        """Frees the slot of an image that needs its keys and values no more."""
        if image.slot is not None:
            self._free_slots.append(image.slot)
            image.slot = None

    def decode(self, images: Sequence[ImageState]) -> list[np.ndarray]:
        """Pixels `(H, W, 3)` uint8 of finished images of one schedule, a few at a time; waits for the device.

        An image whose pixels are no numbers is marked as not finite.
        """
        pixels, is_finite = self.decode_sums([image.code_sum for image in images if image.code_sum is not None])
        for image, is_good in zip(images, is_finite, strict=True):
            image.is_finite = image.is_finite and is_good
        return pixels

    def decode_sums(self, code_sums: Sequence[Tensor]) -> tuple[list[np.ndarray], list[bool]]:
        """Pixels of code sums `(dv, h, w)` of one schedule, and whether they are all numbers."""
        pixels: list[np.ndarray] = []
        is_finite: list[bool] = []
        for start in range(0, len(code_sums), self.decode_images):
            sums = code_sums[start : start + self.decode_images]
            padding = [sums[0]] * (self._size(sums, self.decode_images) - len(sums))
            with torch.inference_mode():
                decoded = self.sampler.pipeline.decode(torch.stack([*sums, *padding]))[: len(sums)]
                is_finite += torch.isfinite(decoded).flatten(1).all(dim=1).tolist()
                pixels.extend(to_uint8(decoded).cpu().numpy())
        return pixels, is_finite

    def _begin(self, images: Sequence[ImageState], limit: int, num_written: int) -> WorkingBatch:
        """A batch at scale 0, with room for the scales that are written."""
        size = self._size(images, limit)
        self._cache.begin(size * (1 + images[0].is_guided), images[0].schedule.first_token(num_written))
        return self.sampler.begin(images, self._cache, size=size)

    def _run(
        self, batch: WorkingBatch, modes: Sequence[Mode], *, keep_last: bool = False, keep_sums: Sequence[int] = ()
    ) -> None:
        for _ in self.sampler.run(batch, modes, keep_last=keep_last, keep_sums=keep_sums):
            pass
        batch.settle()

    def _size(self, images: Sequence[object], limit: int) -> int:
        """Rows of images to run: all of a full batch where shapes are fixed."""
        return limit if self.sampler.fixed_shapes else len(images)
