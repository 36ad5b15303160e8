"""From bytes to batch sizes: what is planned fits, and each strategy has its own size."""

import pytest

from skipvar.engine.memory import BRANCHES, Costs, image_costs, plan_memory
from skipvar.model.presets import PRESETS
from skipvar.model.schedules import find_schedule
from skipvar.skip.strategy import STRATEGY_NAMES

GIB = 2**30


def costs_of(name: str, known: str | None = None) -> Costs:
    config = PRESETS[name]
    schedules = tuple(find_schedule(config.schedules, float(ratio), None) for ratio in config.schedules.grids)
    num_scales = schedules[0].num_scales
    return image_costs(config, schedules, 2, decision_scale=num_scales - 4, known_strategy=known)


def test_what_an_image_of_infinity_2b_costs() -> None:
    """By hand: 2 (keys, values) x 32 layers x 2048 channels x 2 bytes a token; ten scales of the widest ratio held."""
    costs = costs_of("infinity_2b")
    assert costs.bytes_per_token == 2 * 32 * 2048 * 2
    held = max(sum(h * w for h, w in grids[:10]) for grids in PRESETS["infinity_2b"].schedules.grids.values())
    assert costs.prefix_tokens == held and costs.waiting_bytes == 2 * held * costs.bytes_per_token


def test_cheaper_suffixes_get_larger_batches() -> None:
    plan = plan_memory(costs_of("infinity_2b"), batch_size=None, pool_images=None, free_bytes=70 * GIB)
    sizes = plan.suffix_images
    assert set(sizes) == set(STRATEGY_NAMES)
    assert sizes["base"] <= sizes["skip_1"] <= sizes["skip_2"] and sizes["base"] < sizes["uncond_3"]
    assert plan.prefix_images <= plan.pool_images


@pytest.mark.parametrize("name", ["infinity_125m", "infinity_2b", "infinity_8b", "emoji"])
@pytest.mark.parametrize("known", [None, "base", "uncond_3", "skip_3"])
@pytest.mark.parametrize("free_bytes", [None, 20 * GIB, 70 * GIB])
def test_every_batch_fits_the_cache_and_the_memory(name: str, known: str | None, free_bytes: int | None) -> None:
    costs = costs_of(name, known)
    plan = plan_memory(costs, batch_size=None, pool_images=None, free_bytes=free_bytes)
    for strategy in costs.strategies:
        assert plan.suffix_images[strategy.name] * costs.cached_tokens(strategy) <= plan.cache_tokens
    assert plan.prefix_images * BRANCHES * costs.prefix_tokens <= plan.cache_tokens
    if known is not None:
        assert plan.prefix_images == plan.suffix_images[known]
    if free_bytes is not None and plan.prefix_images > 1:
        pool_bytes = plan.pool_images * costs.waiting_bytes if costs.waits else 0
        assert plan.cache_tokens * costs.bytes_per_token + pool_bytes <= free_bytes


def test_given_sizes_are_taken() -> None:
    plan = plan_memory(costs_of("emoji"), batch_size=5, pool_images=3, free_bytes=None)
    assert plan.prefix_images == 5 and set(plan.suffix_images.values()) == {5} and plan.pool_images == 5
