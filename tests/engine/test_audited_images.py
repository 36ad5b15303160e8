"""Audits in the engine: the same images as without, and beside the drawn ones their similarity to `base`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

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
from skipvar.skip.policy import CertifiedPolicy, Promise
from skipvar.types import Image, Request

COUNT = 14

pytestmark = pytest.mark.usefixtures("small_emoji")


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
    return build_engine(config, rule=AuditRule(drawn, ssim))


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
        if any(image.is_base and image.made is not None for image in images):
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


def test_a_request_under_an_alarm_is_made_under_base_and_not_audited(
    run_config: Callable[..., RunConfig], requests: list[Request]
) -> None:
    """Beside others in one engine; its pixels are those of `base`, whatever the policy would say."""
    engine = audited_engine(run_config(batch_size=4), lambda request: True)
    made = run(engine, [replace(request, must_be_base=request.position % 2 == 0) for request in requests])
    for position, image in made.items():
        if position % 2 == 0:
            assert image.strategy == "base" and image.audit_ssim is None and image.cost_share == 1
            assert np.array_equal(image.pixels, generate_one(engine.pipeline, requests[position], "base").pixels)
        else:
            assert image.audit_ssim is not None
    assert len({image.strategy for image in made.values()}) >= 3


def promised(run_config: Callable[..., RunConfig], **audit: float) -> Promise | None:
    return resolve(replace(run_config(), audit=AuditConfig(**audit))).promise  # type: ignore[arg-type]


def test_the_promise_comes_from_the_configuration_or_the_certified_policy(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert promised(run_config, fraction=0.5, min_ssim=0.8) is None and promised(run_config, alpha=0.1) is None
    assert promised(run_config, fraction=0.5, min_ssim=0.8, alpha=0.1) == Promise(0.8, 0.1, 0.05)
    with pytest.raises(ConfigError, match=r"give that as audit\.min_ssim"):
        promised(run_config, fraction=0.5, alpha=0.1)
    own = Promise(0.88, 0.07, 0.02)
    nothing: Any = None
    certified = CertifiedPolicy(
        name="c", content_hash="c", decision_scale=5, table=nothing, tested_with=nothing, aspect_ratio=1.0, promise=own
    )
    monkeypatch.setattr("skipvar.engine.resolved.load_policy", lambda *_, **__: certified)
    assert promised(run_config, fraction=0.5) == own
    assert promised(run_config, fraction=0.5, alpha=0.2, min_ssim=0.5, delta=0.1) == Promise(0.5, 0.2, 0.1)
