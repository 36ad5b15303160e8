"""Executes what the batcher picked: owns the working cache and the slots of images that wait."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from skipvar.engine.memory import BRANCHES, MemoryPlan
from skipvar.engine.sampler import ImageState, SamplingRules, WorkingBatch, run_scales
from skipvar.model.bsq import latent_grid
from skipvar.model.kv_cache import KeyValueCache, SlotStore
from skipvar.model.pipeline import Pipeline, to_uint8
from skipvar.model.schedules import Schedule
from skipvar.skip.probe import take_probe
from skipvar.skip.strategy import Mode, num_scales_run
from skipvar.types import Probe


class Runner:
    """One model with its preallocated memory. Not thread-safe: one engine thread drives it."""

    def __init__(
        self,
        pipeline: Pipeline,
        rules: SamplingRules,
        plan: MemoryPlan,
        *,
        slot_tokens: int,
        use_mask: bool,
        fixed_shapes: bool,
    ) -> None:
        config = pipeline.config.transformer
        self.pipeline, self.rules, self.plan = pipeline, rules, plan
        self._use_mask, self._fixed_shapes = use_mask, fixed_shapes
        self._cache = KeyValueCache(
            depth=config.depth,
            num_heads=config.num_heads,
            head_width=config.head_width,
            capacity=plan.cache_tokens,
            dtype=pipeline.dtype,
            device=pipeline.device,
        )
        self._slots = SlotStore(like=self._cache, slots=plan.pool_images, branches=BRANCHES, tokens=slot_tokens)
        self._free_slots = list(reversed(range(plan.pool_images)))

    def run_whole(self, images: Sequence[ImageState], modes: Sequence[Mode], limit: int) -> None:
        """All scales of images whose strategy is known before they start."""
        batch = self._begin(images, modes, limit)
        self._run(batch, modes)

    def run_prefix(self, images: Sequence[ImageState], decision_scale: int, limit: int) -> WorkingBatch:
        """The scales up to and with the decision scale; the batch's keys and values stay in the working cache."""
        modes = [Mode.GUIDED] * (decision_scale + 1)
        batch = self._begin(images, modes, limit, written_scales=decision_scale + 1)
        self._run(batch, modes, keep_last=True, keep_sums=(decision_scale - 1,))
        return batch

    def probe(self, batch: WorkingBatch, decision_scale: int, grid_scale: int) -> list[Probe]:
        """The probe of each image of a prefix batch; waits for the device."""
        is_patchified = self.pipeline.config.transformer.spatial_patchify
        grid = latent_grid(batch.images[0].schedule.grids[grid_scale], is_patchified)
        with torch.inference_mode():
            features = take_probe(self.pipeline.decode, batch.history[decision_scale - 1], batch.code_sum, grid)
        pairs = zip(features.sobel_change.tolist(), features.fft_high_frequency_ratio.tolist(), strict=True)
        probes = [Probe(sobel_change=change, fft_high_frequency_ratio=ratio) for change, ratio in pairs]
        return probes[: len(batch.images)]

    def hold(self, batch: WorkingBatch, indices: Sequence[int]) -> None:
        """Moves images of a prefix batch, by their places in it, to slots."""
        if not indices:
            return
        slots = [self._free_slots.pop() for _ in indices]
        for index, slot in zip(indices, slots, strict=True):
            batch.images[index].slot = slot
        self._slots.store(self._index(slots), batch.cache, self._index(indices), branches=1 + batch.is_guided)

    def run_suffix(
        self,
        images: Sequence[ImageState],
        decision_scale: int,
        modes: Sequence[Mode],
        limit: int,
        *,
        keep_slots: bool = False,
    ) -> None:
        """The scales after the decision scale, for images that share their modes; frees their slots."""
        slots = [image.slot for image in images if image.slot is not None]
        members = [*slots, *([slots[0]] * (self._size(images, limit) - len(slots)))]
        first = decision_scale + 1
        is_guided = images[0].is_guided and modes[first] is Mode.GUIDED
        schedule = images[0].schedule
        self._slots.load(
            self._index(members),
            self._cache,
            branches=1 + is_guided,
            length=schedule.first_token(first),
            num_tokens=schedule.first_token(num_scales_run(modes) - 1),
        )
        batch = WorkingBatch.begin(
            self.pipeline, images, self._cache,
            scale=first, is_guided=is_guided, size=len(members), use_mask=self._use_mask,
        )  # fmt: skip
        self._run(batch, modes)
        if not keep_slots:
            for image in images:
                self.release(image)

    def release(self, image: ImageState) -> None:
        """Frees the slot of an image that will not go on."""
        if image.slot is not None:
            self._free_slots.append(image.slot)
            image.slot = None

    def decode(self, images: Sequence[ImageState]) -> list[np.ndarray]:
        """Pixels `(H, W, 3)` uint8 of finished images of one schedule, a few at a time; waits for the device."""
        pixels: list[np.ndarray] = []
        for start in range(0, len(images), self.plan.decode_images):
            sums = [image.code_sum for image in images[start : start + self.plan.decode_images]]
            size = self._size(sums, self.plan.decode_images)
            members = torch.stack([code_sum for code_sum in sums if code_sum is not None])
            members = torch.cat([members, members[:1].expand(size - len(sums), -1, -1, -1)])
            with torch.inference_mode():
                decoded = to_uint8(self.pipeline.decode(members)).cpu().numpy()
            pixels.extend(decoded[: len(sums)])
        return pixels

    def _begin(
        self, images: Sequence[ImageState], modes: Sequence[Mode], limit: int, written_scales: int | None = None
    ) -> WorkingBatch:
        """A batch at scale 0, with room for the scales that are written (all that run but the last)."""
        schedule: Schedule = images[0].schedule
        num_tokens = schedule.first_token(num_scales_run(modes) - 1 if written_scales is None else written_scales)
        size = self._size(images, limit)
        self._cache.begin(size * (1 + images[0].is_guided), num_tokens)
        return WorkingBatch.begin(self.pipeline, images, self._cache, size=size, use_mask=self._use_mask)

    def _run(
        self, batch: WorkingBatch, modes: Sequence[Mode], *, keep_last: bool = False, keep_sums: Sequence[int] = ()
    ) -> None:
        for _ in run_scales(self.pipeline, self.rules, batch, modes, keep_last=keep_last, keep_sums=keep_sums):
            pass
        batch.settle()

    def _size(self, images: Sequence[object], limit: int) -> int:
        """Rows of images to run: all of a full batch where shapes are fixed."""
        return limit if self._fixed_shapes else len(images)

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.pipeline.device)
