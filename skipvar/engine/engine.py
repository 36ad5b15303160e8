"""The engine: requests in, images out, batched by schedule before the decision and by skip pattern after it."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from skipvar.engine.audit import AuditRule, as_its_own_base, with_base
from skipvar.engine.batcher import Batch, Batcher, Bucket, Limits, Stream
from skipvar.engine.resolved import DeviceReport
from skipvar.engine.runner import Runner
from skipvar.engine.sampler import WorkingBatch
from skipvar.engine.state import ImageState
from skipvar.engine.statistics import BatchCount, EngineStatistics
from skipvar.errors import ModelError, RowError
from skipvar.skip.features import LatentProbe, ProbeRule
from skipvar.skip.policy import Decision, Policy
from skipvar.skip.strategy import make_strategy
from skipvar.types import Failure, Image, Request

logger = logging.getLogger(__name__)

Finished = Image | Failure
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lack:
    """What came of a batch for which the device had too little memory."""

    reason: str


def within_memory(run: Callable[[], Result]) -> Result | Lack:
    """What `run` gives, or the lack of memory that ended it.

    By then the exception is gone, and with its frames the tensors of what was half done: the memory is really free.
    """
    try:
        return run()
    except torch.OutOfMemoryError as error:
        reason = str(error)
    torch.cuda.empty_cache()
    return Lack(reason)


class Engine:
    """One model on one device. `submit` requests, `step` until they are finished. One thread drives it."""

    def __init__(
        self,
        runner: Runner,
        policy: Policy,
        limits: Limits,
        report: DeviceReport,
        audit_rule: AuditRule | None = None,
    ) -> None:
        self.sampler = runner.sampler
        self.pipeline = runner.sampler.pipeline
        self.policy = policy
        self.statistics = EngineStatistics()
        self.report = report
        self._runner = runner
        self._batcher: Batcher[ImageState] = Batcher(limits)
        self._failed: list[Finished] = []
        """What ended without a batch that finished it."""
        self._audit_rule = audit_rule

    @property
    def num_pending(self) -> int:
        """Requests that were submitted and not returned."""
        return len(self._failed) + self._batcher.num_queued + self._batcher.num_waiting

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests; a request that this model cannot make comes back from `step` as a failure."""
        for request in requests:
            try:
                image = self.sampler.new_image(request)
            except RowError as error:
                self._refuse(request, error)
            else:
                self._batcher.add(Stream(image.schedule, image.is_guided), image)

    def can_step(self, *, flush: bool = False) -> bool:
        """Whether `step` would do anything; without `flush` an engine may wait for more images to fill a batch."""
        return bool(self._failed) or self._batcher.can_pick(flush=flush)

    def step(self, *, flush: bool = False) -> list[Finished]:
        """Picks a batch, runs it, settles its images; returns those that are finished.

        `flush` also runs part-full batches: nothing more is coming soon.
        """
        batch = self._batcher.pick(flush=flush)
        finished = self._run_batch(batch) if batch is not None else []
        failed, self._failed = self._failed, []
        return [*failed, *finished]

    def drain(self) -> list[Finished]:
        """Everything that is left, part-full batches included."""
        finished: list[Finished] = []
        while self.num_pending:
            finished += self.step(flush=True)
        return finished

    def _run_batch(self, batch: Batch[ImageState]) -> list[Finished]:
        """Runs a batch and settles its images; where memory lacks, they go back to the state that they had and are
        queued again, and this kind of batch is halved for good."""
        before = [image.snapshot() for image in batch.items]
        done = within_memory(lambda: self._run(batch))
        if not isinstance(done, Lack):
            return self._settle(done)
        for image, snapshot in zip(batch.items, before, strict=True):
            image.restore(snapshot)
        if self._can_shrink(batch.items, str(batch.key), done):
            self._batcher.put_back(batch)
            self._batcher.lower_limit(batch.key, max(1, min(batch.limit // 2, len(batch.items) - 1)))
        return []

    def _run(self, batch: Batch[ImageState]) -> list[ImageState]:
        """Runs a batch; returns its images that have no scale left to run. Only then anything but them has changed."""
        if isinstance(batch.key, Bucket):
            return self._run_suffix(batch, batch.key)
        self._encode_text(batch.items)
        if self.policy.known_strategy is not None:
            return self._run_whole(batch, self.policy.known_strategy)
        return self._run_prefix(batch)

    def _encode_text(self, images: Sequence[ImageState]) -> None:
        with self._timed("text", images):
            for image in images:
                self.sampler.encode_text(image)

    def _run_whole(self, batch: Batch[ImageState], name: str) -> list[ImageState]:
        strategy = make_strategy(name, batch.items[0].schedule.num_scales)
        with self._timed("suffix", batch.items):
            self._runner.run_whole(batch.items, strategy.modes, batch.limit)
        self._count(self.statistics.whole[name], batch)
        for image in batch.items:
            image.strategy = strategy
        return batch.items

    def _run_prefix(self, batch: Batch[ImageState]) -> list[ImageState]:
        """Prefix, probe, policy; images with scales left to run move to their buckets."""
        with self._timed("prefix", batch.items):
            working = self._runner.run_prefix(batch.items, self._decision_scale, batch.limit)
        self._decide(working)
        done = [image for image in batch.items if self._ends_at_decision(image)]
        audited = [image for image in batch.items if self._is_drawn(image.request) and not image.is_base]
        places = [place for place, image in enumerate(batch.items) if image not in done or image in audited]
        self._runner.hold(working, places)
        self._count(self.statistics.prefix, batch)
        for image in audited:
            image.at_decision = image.snapshot()  # itself without one: see `_finish`
        for image in batch.items:
            if image not in done:
                self._queue_suffix(image)
        return done

    def _queue_suffix(self, image: ImageState) -> None:
        assert image.strategy is not None
        self._batcher.add(Bucket(image.schedule, image.is_guided, image.strategy.name), image)

    def _decide(self, working: WorkingBatch) -> None:
        """Asks the policy for each image's strategy."""
        with self._timed("probe", working.images):
            numbers = self._look(working, self.policy.probe)
        for image, found in zip(working.images, numbers, strict=True):
            decision = Decision("base") if image.request.must_be_base else self.policy.decide(image.request, found)
            image.scores = decision.scores
            image.strategy = make_strategy(decision.strategy, image.schedule.num_scales)

    def _look(self, working: WorkingBatch, rule: ProbeRule) -> list[tuple[float, ...]]:
        """What the policy decides by, image by image."""
        if isinstance(rule, LatentProbe):
            return [rule.pick(latents) for latents in self._runner.latents(working, self._decision_scale)]
        probes = self._runner.probe(working, self._decision_scale, rule.grid_scale)
        for image, probe in zip(working.images, probes, strict=True):
            image.probe = probe
        return [probe.numbers for probe in probes]

    def _ends_at_decision(self, image: ImageState) -> bool:
        assert image.strategy is not None
        return image.strategy.num_scales_run == self._decision_scale + 1

    def _run_suffix(self, batch: Batch[ImageState], bucket: Bucket) -> list[ImageState]:
        strategy = make_strategy(bucket.strategy, batch.items[0].schedule.num_scales)
        with self._timed("suffix", batch.items):
            self._runner.run_suffix(batch.items, self._decision_scale, strategy.modes, batch.limit)
        self._count(self.statistics.suffix[bucket.strategy], batch)
        for image in batch.items:
            if image.at_decision is None:
                self._runner.release(image)
        return batch.items

    def _is_drawn(self, request: Request) -> bool:
        return self._audit_rule is not None and not request.must_be_base and self._audit_rule.is_audited(request)

    def _finish(self, image: ImageState, pixels: np.ndarray) -> Image | None:
        """The result of a decoded image; None of one that is to be made under `base` as well: it is queued for that."""
        if image.made is not None:
            assert self._audit_rule is not None
            return with_base(image.made, pixels, sum(image.seconds.values()), self._audit_rule)
        run, base = image.token_forwards()
        self.statistics.token_forwards_run += run
        self.statistics.token_forwards_saved += base - run
        made = image.finish(pixels)
        if image.at_decision is None:
            return as_its_own_base(made) if image.is_base and self._is_drawn(image.request) else made
        image.restore(image.at_decision)  # which has no `at_decision` itself: the slot is free after this suffix
        image.made, image.strategy = made, make_strategy("base", image.schedule.num_scales)
        self._queue_suffix(image)
        return None

    def _settle(self, images: Sequence[ImageState]) -> list[Finished]:
        """Decodes finished images of one schedule; one whose logits or pixels are no numbers is a failure, so is one
        that lacks the memory to be decoded alone."""
        for image in images:
            if not image.is_finite:
                self._fail_as_unfinite(image, "logits")
        finished: list[Finished] = []
        left = [image for image in images if image.is_finite]
        while left:
            chunk = left[: self._runner.decode_images]
            pixels = self._decode(chunk)
            if isinstance(pixels, Lack):
                if self._can_shrink(chunk, "decoding", pixels):
                    self._runner.decode_images = max(1, min(self._runner.decode_images // 2, len(chunk) - 1))
                else:
                    left = left[1:]
                continue
            for image in chunk:
                if not image.is_finite:
                    self._fail_as_unfinite(image, "pixels")
            good = [(image, pixel) for image, pixel in zip(chunk, pixels, strict=True) if image.is_finite]
            made = [self._finish(image, pixel) for image, pixel in good]
            finished += [image for image in made if image is not None]
            left = left[len(chunk) :]
        self.statistics.images += len(finished)
        return finished

    def _decode(self, images: Sequence[ImageState]) -> list[np.ndarray] | Lack:
        with self._timed("decode", images):
            return within_memory(lambda: self._runner.decode(images))

    def _can_shrink(self, images: Sequence[ImageState], what: str, lack: Lack) -> bool:
        """Counts a lack of memory. Whether fewer images at a time may do: a single one fails.

        Raises `ModelError` under fixed shapes: the run's pixels were promised for its batch sizes.
        """
        if self.sampler.fixed_shapes:
            raise ModelError(
                f"not enough device memory for a batch ({what}; {lack.reason}), which cannot shrink under "
                "engine.fixed_shapes; give a smaller engine.batch_size"
            )
        self.statistics.out_of_memory += 1
        logger.warning("out of memory with %d images (%s)", len(images), what)
        if len(images) > 1:
            return True
        self._fail(images[0], f"not enough device memory for one image ({lack.reason})")
        return False

    def _fail_as_unfinite(self, image: ImageState, what: str) -> None:
        self._fail(image, f"the model gave {what} that are not finite numbers in {self.pipeline.dtype}")

    def _fail(self, image: ImageState, reason: str) -> None:
        """Ends an image and frees its slot; where only its audit failed, it is there as it was decided.

        (A trial that failed has nothing `made`: its image was restored, or is found not to be finite before.)
        """
        self._runner.release(image)
        if image.made is not None:
            self._failed.append(image.made)
        else:
            self._refuse(image.request, ModelError(reason))

    def _refuse(self, request: Request, error: Exception) -> None:
        self.statistics.failures += 1
        self._failed.append(Failure.of(request, error))

    @property
    def _decision_scale(self) -> int:
        assert self.policy.decision_scale is not None
        return self.policy.decision_scale

    def _count(self, into: BatchCount, batch: Batch[ImageState]) -> None:
        into.add(BatchCount(1, len(batch.items), batch.limit))

    @contextmanager
    def _timed(self, what: str, images: Sequence[ImageState]) -> Iterator[None]:
        """Adds the seconds of a block to the statistics and, in equal shares, to its images."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.statistics.seconds[what] += seconds
        for image in images:
            image.seconds[what] = image.seconds.get(what, 0.0) + seconds / len(images)
