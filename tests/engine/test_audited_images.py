"""Audits in the engine: the same images as without, and beside the drawn ones their similarity to `base`."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from skipvar.config import AuditConfig, RunConfig
from skipvar.engine.audit import AuditRule
from skipvar.engine.build import build_engine
from skipvar.engine.engine import Engine
from skipvar.engine.resolved import resolve
from skipvar.engine.twin import generate_one
from skipvar.errors import ConfigError
from skipvar.local import build_local_engine
from skipvar.quality.similarity import ssim
from skipvar.types import Image, Request

COUNT = 14


def run(engine: Engine, requests: list[Request]) -> dict[int, Image]:
    engine.submit(requests)
    finished = engine.drain()
    assert all(isinstance(item, Image) for item in finished)
    return {item.request.position: item for item in finished if isinstance(item, Image)}


@pytest.fixture(scope="module")
def requests(make_request: Callable[..., Request]) -> list[Request]:
    return [make_request(position) for position in range(COUNT)]


@pytest.fixture(scope="module")
def plain(run_config: Callable[..., RunConfig], requests: list[Request]) -> dict[int, Image]:
    return run(build_engine(run_config(batch_size=4)), requests)


def audited_engine(config: RunConfig, drawn: Callable[[Request], bool]) -> Engine:
    engine = build_engine(config)
    engine.audit_rule = AuditRule(drawn, ssim)
    return engine


def test_audited_images_are_the_same_and_tell_their_similarity(
    run_config: Callable[..., RunConfig], requests: list[Request], plain: dict[int, Image]
) -> None:
    engine = audited_engine(run_config(batch_size=4), lambda request: request.position % 3 != 1)
    made = run(engine, requests)
    assert set(made) == set(range(COUNT)) and engine.num_pending == 0
    for position, image in made.items():
        assert np.array_equal(image.pixels, plain[position].pixels) and image.strategy == plain[position].strategy
        assert (image.audit_ssim is None) == (position % 3 == 1)
        assert image.cost_share == plain[position].cost_share
        if image.audit_ssim is not None:
            base = generate_one(engine.pipeline, requests[position], "base")
            assert image.audit_ssim == pytest.approx(float(ssim(image.pixels[None], base.pixels[None])[0]))
    assert len({image.strategy for image in made.values() if image.audit_ssim is not None}) >= 4
    assert run(engine, requests).keys() == made.keys()  # every slot is free again
    assert engine.statistics.images == 2 * COUNT


def test_an_audit_that_lacks_memory_costs_no_image(
    run_config: Callable[..., RunConfig],
    requests: list[Request],
    plain: dict[int, Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = audited_engine(run_config(batch_size=4), lambda request: True)
    suffix = engine._runner.run_suffix

    def lacking(images: list, decision_scale: int, modes: list, limit: int) -> None:
        if any(image.is_base and image.request.key in engine._audited for image in images):
            raise torch.OutOfMemoryError("no memory for base")
        suffix(images, decision_scale, modes, limit)

    monkeypatch.setattr(engine._runner, "run_suffix", lacking)
    made = run(engine, requests)
    for position, image in made.items():
        assert np.array_equal(image.pixels, plain[position].pixels)
        assert image.audit_ssim is None or image.strategy == "base"


def test_the_configuration_s_share_is_drawn(run_config: Callable[..., RunConfig], requests: list[Request]) -> None:
    made = run(build_local_engine(replace(run_config(batch_size=4), audit=AuditConfig(fraction=1.0))), requests[:3])
    assert all(image.audit_ssim is not None for image in made.values())


def test_a_policy_that_decides_nothing_is_not_audited(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="decides nothing image by image"):
        resolve(replace(run_config("fixed:skip_2"), audit=AuditConfig(fraction=0.1)))
