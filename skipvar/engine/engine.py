"""The engine: requests in, images out, batched by schedule before the decision and by skip pattern after it."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from skipvar.engine.batcher import Batch, Batcher, Bucket, Limits, Stream
from skipvar.engine.runner import Runner
from skipvar.engine.sampler import ImageState, SamplingRules, WorkingBatch, encode_text, finished_image, new_image
from skipvar.engine.statistics import BatchCount, EngineStatistics
from skipvar.errors import ModelError, RowError
from skipvar.model.pipeline import Pipeline
from skipvar.skip.policy import Decision, Policy
from skipvar.skip.strategy import make_strategy
from skipvar.types import Failure, Image, Request

logger = logging.getLogger(__name__)

Finished = Image | Failure


class Engine:
    """One model on one device. `submit` requests, `step` until they are finished. One thread drives it."""

    def __init__(
        self, pipeline: Pipeline, rules: SamplingRules, policy: Policy, runner: Runner, limits: Limits
    ) -> None:
        self.pipeline = pipeline
        self.rules = rules
        self.policy = policy
        self.statistics = EngineStatistics()
        self.facts: dict[str, Any] = {}
        """What was resolved when it was built: `describe()`."""
        self._runner = runner
        self._batcher: Batcher[ImageState] = Batcher(limits)
        self._failed: list[Failure] = []

    def describe(self) -> dict[str, Any]:
        """Device, dtype, model, policy, batch sizes and the self-check's verdict, JSON-able."""
        return dict(self.facts)

    @property
    def num_pending(self) -> int:
        """Requests that were submitted and not returned."""
        return len(self._failed) + self._batcher.num_queued + self._batcher.num_waiting

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests; a request that this model cannot make comes back from `step` as a failure."""
        for request in requests:
            try:
                image = new_image(self.pipeline, request, self.rules)
            except RowError as error:
                self._fail(request, error)
            else:
                self._batcher.add(Stream(image.schedule, image.is_guided), image)

    def can_step(self, *, flush: bool = False) -> bool:
        """Whether `step` would do anything; without `flush` an engine may wait for more images to fill a batch."""
        return bool(self._failed) or self._batcher.can_pick(flush=flush)

    def step(self, *, flush: bool = False) -> list[Finished]:
        """Picks a batch, runs it, settles its images; returns those that are finished.

        `flush` also runs part-full batches: nothing more is coming soon.
        """
        finished: list[Finished] = [*self._failed]
        self._failed.clear()
        batch = self._batcher.pick(flush=flush)
        if batch is None:
            return finished
        try:
            done = self._run(batch)
        except torch.OutOfMemoryError as error:
            self._shrink(batch, error)
            return [*finished, *self._take_failed()]
        return [*finished, *self._settle(done), *self._take_failed()]

    def drain(self) -> list[Finished]:
        """Everything that is left, part-full batches included."""
        finished: list[Finished] = []
        while self.num_pending:
            finished += self.step(flush=True)
        return finished

    def _run(self, batch: Batch[ImageState]) -> list[ImageState]:
        """Runs a batch; returns its images that have no scale left to run."""
        streams = [(image, image.generator.get_state()) for image in batch.items]
        try:
            if isinstance(batch.key, Bucket):
                return self._run_suffix(batch, batch.key)
            with self._timed("text", batch.items):
                for image in batch.items:
                    encode_text(self.pipeline, image)
            if self.policy.known_strategy is not None:
                return self._run_whole(batch, self.policy.known_strategy)
            return self._run_prefix(batch)
        except torch.OutOfMemoryError:
            for image, state in streams:
                image.generator.set_state(state)
            raise

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
        self._count(self.statistics.prefix, batch)
        self._decide(working)
        is_done = [self._ends_at_decision(image) for image in batch.items]
        self._runner.hold(working, [index for index, done in enumerate(is_done) if not done])
        for image, done in zip(batch.items, is_done, strict=True):
            if not done:
                assert image.strategy is not None
                self._batcher.put(Bucket(image.schedule, image.is_guided, image.strategy.name), image)
        return [image for image, done in zip(batch.items, is_done, strict=True) if done]

    def _decide(self, working: WorkingBatch) -> None:
        """Asks the policy for each image's strategy."""
        if self.policy.needs_probe:
            with self._timed("probe", working.images):
                probes = self._runner.probe(working, self._decision_scale, self.policy.grid_scale)
            for image, probe in zip(working.images, probes, strict=True):
                image.probe = probe
        for image in working.images:
            decision: Decision = self.policy.decide(image.request, image.probe)
            image.strategy = make_strategy(decision.strategy, image.schedule.num_scales)
            image.scores = decision.scores

    def _ends_at_decision(self, image: ImageState) -> bool:
        assert image.strategy is not None
        return image.strategy.num_scales_run == self._decision_scale + 1

    def _run_suffix(self, batch: Batch[ImageState], bucket: Bucket) -> list[ImageState]:
        strategy = make_strategy(bucket.strategy, batch.items[0].schedule.num_scales)
        with self._timed("suffix", batch.items):
            self._runner.run_suffix(batch.items, self._decision_scale, strategy.modes, batch.limit)
        self._count(self.statistics.suffix[bucket.strategy], batch)
        return batch.items

    def _settle(self, images: Sequence[ImageState]) -> list[Finished]:
        """Decodes finished images of one schedule; one whose logits were not numbers is a failure."""
        for image in images:
            if not image.is_finite:
                error = ModelError(f"the model gave logits that are not finite numbers in {self.pipeline.dtype}")
                self._fail(image.request, error)
        good = [image for image in images if image.is_finite]
        if not good:
            return []
        with self._timed("decode", good):
            pixels = self._runner.decode(good)
        finished = [finished_image(image, pixel) for image, pixel in zip(good, pixels, strict=True)]
        self.statistics.images += len(good)
        for image in good:
            run, base = image.token_forwards()
            self.statistics.token_forwards_run += run
            self.statistics.token_forwards_saved += base - run
        return list(finished)

    def _shrink(self, batch: Batch[ImageState], error: torch.OutOfMemoryError) -> None:
        """Out of memory: halves this kind of batch for good and queues its images again; a single image fails."""
        torch.cuda.empty_cache()
        if len(batch.items) == 1:
            image = batch.items[0]
            self._runner.release(image)
            self._fail(image.request, ModelError(f"not enough device memory for one image ({error})"))
            return
        self.statistics.out_of_memory += 1
        logger.warning("out of memory with %d images of %s: halving", len(batch.items), batch.key)
        self._batcher.put_back(batch)
        self._batcher.lower_limit(batch.key, max(1, len(batch.items) // 2))

    @property
    def _decision_scale(self) -> int:
        assert self.policy.decision_scale is not None
        return self.policy.decision_scale

    def _fail(self, request: Request, error: Exception) -> None:
        self.statistics.failures += 1
        self._failed.append(Failure.of(request, error))

    def _take_failed(self) -> list[Failure]:
        failed, self._failed = self._failed, []
        return failed

    def _count(self, into: BatchCount, batch: Batch[ImageState]) -> None:
        self.statistics.count(into, len(batch.items), batch.limit)

    @contextmanager
    def _timed(self, what: str, images: Sequence[ImageState] = ()) -> Iterator[None]:
        """Adds the seconds of a block to the statistics and, in equal shares, to its images."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.statistics.seconds[what] += seconds
        for image in images:
            image.seconds += seconds / len(images)
