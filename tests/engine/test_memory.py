"""From bytes to batch sizes: what is planned fits, batches run full, and each strategy has its own size."""

import random
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipvar.engine.batcher import Batcher, Bucket, Limits, Stream
from skipvar.engine.memory import (
    BRANCHES,
    MAX_ROWS,
    Costs,
    MemoryPlan,
    batch_sizes,
    decoder_bytes,
    plan_memory,
)
from skipvar.errors import ConfigError, ModelError
from skipvar.model.attention import TextPadding
from skipvar.model.kv_cache import KeyValueCache
from skipvar.model.presets import PRESETS
from skipvar.model.schedules import find_schedule
from skipvar.model.transformer import Transformer
from skipvar.model.vae import Decoder
from skipvar.skip.strategy import PAPER_STRATEGIES, STRATEGY_NAMES

GIB = 2**30
TEXT_ENCODER_BYTES = 2_450_000_000
"""The encoder of flan-t5-xl in bfloat16."""
CONTEXT_BYTES = 600_000_000
"""What a CUDA process takes before it does anything."""
MIXES = {
    "uniform": dict.fromkeys(PAPER_STRATEGIES, 1.0),
    "skip-heavy": {name: {"skip_1": 6.0, "skip_2": 6.0, "skip_3": 4.0}.get(name, 0.5) for name in PAPER_STRATEGIES},
    "uniform over all ten": dict.fromkeys(STRATEGY_NAMES, 1.0),
}


def costs_of(
    name: str, known: str | None = None, size: str | None = None, strategies: Sequence[str] = PAPER_STRATEGIES
) -> Costs:
    config = PRESETS[name]
    schedules = tuple(find_schedule(config.schedules, float(ratio), size) for ratio in config.schedules.grids)
    num_scales = schedules[0].num_scales
    if known is not None:
        return Costs(config, schedules, 2, None, (known,))
    return Costs(config, schedules, 2, num_scales - 4, strategies)


def plan_of(costs: Costs, free_bytes: int | None, **changes: Any) -> MemoryPlan:
    options: dict[str, Any] = {"device": "cuda", "batch_size": None, "pool_images": None, **changes}
    return plan_memory(costs, free_bytes=free_bytes, **options)


def free_bytes(name: str, card_gib: int) -> int:
    """Of a card that holds the model in bfloat16."""
    with torch.device("meta"):
        parts = [Transformer(PRESETS[name].transformer), Decoder(PRESETS[name].vae)]
    weights = 2 * sum(parameter.numel() for part in parts for parameter in part.parameters())
    return card_gib * GIB - weights - TEXT_ENCODER_BYTES - CONTEXT_BYTES


def suffix_fill(plan: MemoryPlan, mix: dict[str, float], num_images: int = 4000) -> float:
    """Of the real batcher, with as many requests queued as a worker keeps there."""
    chance, batcher = random.Random(0), Batcher[str](Limits(plan.prefix_images, plan.suffix_images, plan.pool_images))
    left, run, room = num_images, 0, 0
    while left or batcher.num_queued or batcher.num_waiting:
        while left and batcher.num_queued < 2 * plan.pool_images:
            batcher.add(Stream("square", True), chance.choices(list(mix), list(mix.values()))[0])
            left -= 1
        batch = batcher.pick(flush=not left)
        assert batch is not None
        if isinstance(batch.key, Bucket):
            run, room = run + len(batch.items), room + batch.limit
            continue
        for name in batch.items:
            if name != "skip_3":
                batcher.add(Bucket("square", True, name), name)
        assert batcher.num_waiting <= plan.pool_images
    return run / room


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(
    ("name", "card_gib"),
    [("infinity_2b", 24), ("infinity_2b", 40), ("infinity_2b", 80), ("infinity_8b", 40), ("infinity_8b", 80)],
)
def test_batches_run_full_in_the_memory_that_is_there(name: str, card_gib: int, mix: dict[str, float]) -> None:
    free = free_bytes(name, card_gib)
    plan = plan_of(costs_of(name, strategies=list(mix)), free)
    fill = suffix_fill(plan, mix)
    print(
        f"{name} {card_gib} GB: free {free / 1e9:.1f}, planned {plan.planned_bytes / 1e9:.1f}, prefix "
        f"{plan.prefix_images}, suffix {dict(plan.suffix_images)}, pool {plan.pool_images}, decode "
        f"{plan.decode_images}, fill {fill:.3f}"
    )
    assert fill >= 0.9 and plan.planned_bytes <= free


def test_a_model_that_does_not_fit_is_refused_in_one_sentence() -> None:
    free = free_bytes("infinity_8b", 24)
    with pytest.raises(ModelError, match=r"^infinity_8b at size 1M needs .* GB .* are free: use a smaller") as refusal:
        plan_of(costs_of("infinity_8b"), free)
    assert "\n" not in str(refusal.value)
    assert plan_of(costs_of("infinity_8b", size="0.25M"), free).planned_bytes <= free


def test_the_budget_depends_on_the_model_alone_and_memory_only_lowers_it() -> None:
    costs = costs_of("infinity_2b")
    sizes = batch_sizes(costs, device="cuda")
    assert sizes.prefix_images == 8 and sizes.suffix_images["base"] == 2 and sizes.suffix_images["uncond_3"] == 4
    for strategy in costs.strategies:
        assert sizes.suffix_images[strategy.name] * costs.suffix_rows(strategy) <= MAX_ROWS["cuda"]
    for free in range(20 * GIB, 300 * GIB, 20 * GIB):
        plan = plan_of(costs, free)
        assert plan.prefix_images <= sizes.prefix_images and plan.decode_images <= sizes.decode_images
        assert all(plan.suffix_images[name] <= size for name, size in sizes.suffix_images.items())
    assert plan.suffix_images == sizes.suffix_images and plan.prefix_images == sizes.prefix_images


def test_fixed_shapes_have_the_budgets_sizes_or_are_refused() -> None:
    costs = costs_of("infinity_2b")
    sizes, plan = batch_sizes(costs, device="cuda"), plan_of(costs, 80 * GIB, fixed_shapes=True)
    assert (plan.prefix_images, plan.suffix_images, plan.decode_images) == (
        sizes.prefix_images,
        sizes.suffix_images,
        sizes.decode_images,
    )
    with pytest.raises(ConfigError, match=r"engine\.fixed_shapes.*smaller engine\.batch_size"):
        plan_of(costs, 20 * GIB, fixed_shapes=True)
    plan = plan_of(costs, 40 * GIB, fixed_shapes=True, batch_size=2)
    assert set(plan.suffix_images.values()) == {2} == {batch_sizes(costs, device="cuda", batch_size=2).prefix_images}


def test_what_an_image_of_infinity_2b_costs() -> None:
    """By hand: 2 (keys, values) x 32 layers x 2048 channels x 2 bytes a token; ten scales of the widest ratio held."""
    costs = costs_of("infinity_2b")
    assert costs.bytes_per_token == 2 * 32 * 2048 * 2
    held = max(sum(h * w for h, w in grids[:10]) for grids in PRESETS["infinity_2b"].schedules.grids.values())
    assert costs.prefix_tokens == held and costs.waiting_bytes == 2 * held * costs.bytes_per_token
    assert costs.text_bytes == 2 * 512 * costs.bytes_per_token


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of new tensors that are alive, on any device, and remembers the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._owners: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._own(tensor, is_old=self._key(tensor) in given)
        return result

    def _key(self, tensor: torch.Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _own(self, tensor: torch.Tensor, *, is_old: bool) -> None:
        key, size = self._key(tensor), tensor.untyped_storage().nbytes()
        if is_old and not self._owners[key]:
            return  # a view of something that was there before
        if not self._owners[key]:
            self.now += size
            self.most = max(self.most, self.now)
        self._owners[key] += 1
        weakref.finalize(tensor, self._disown, key, size)

    def _disown(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            self.now -= size


def most_bytes(run: Callable[[], Any]) -> int:
    with torch.inference_mode(), LiveBytes() as live:
        run()
    return live.most


@pytest.mark.parametrize("name", ["infinity_2b", "infinity_8b"])
@pytest.mark.parametrize(("scale", "write"), [(9, True), (11, True), (12, False)])
def test_a_steps_memory_is_what_its_tensors_take(
    name: str, scale: int, write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the real size on tensors without data. Attention is taken to keep its result alone, as on GPUs."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda queries, *_, **__: torch.empty_like(queries))
    config = PRESETS[name].transformer
    schedule = find_schedule(PRESETS[name].schedules, 1.0, None)
    with torch.device("meta"):
        transformer = Transformer(config).to_dtype(torch.bfloat16)
        text = transformer.encode_text(torch.empty(2, 64, config.text_width), [64, 32], TextPadding.LONGEST)
        cache = KeyValueCache(
            depth=config.depth,
            num_heads=config.num_heads,
            head_width=config.head_width,
            capacity=2 * schedule.first_token(13),
            dtype=torch.bfloat16,
            device=torch.device("meta"),
        )
        cache.begin(2, schedule.first_token(13))
        cache.length = schedule.first_token(scale)
        tokens = schedule.num_tokens[scale]
        rope = (torch.empty(tokens, config.head_width // 2), torch.empty(tokens, config.head_width // 2))

    def run() -> None:
        x = torch.empty(2, tokens, config.width, device="meta")
        transformer.logits(transformer(x, text, rope, cache, write=write), text)

    costs = Costs(PRESETS[name], (schedule,), 2, 9, PAPER_STRATEGIES)
    planned = costs._step_bytes(2 * tokens, 0 if write else 2 * schedule.first_token(scale + 1))
    found = most_bytes(run)
    print(f"{name} scale {scale}: {found / 1e9:.3f} GB, planned {planned / 1e9:.3f} GB")
    assert found <= planned <= 1.25 * found


@pytest.mark.parametrize("name", ["infinity_2b", "infinity_8b", "emoji"])
def test_decoding_takes_what_is_planned(name: str) -> None:
    """The tensors; the plan also has room for a convolution's copies of what it reads and writes."""
    vae = PRESETS[name].vae
    with torch.device("meta"):
        decoder = Decoder(vae).to(torch.bfloat16)
        side = 1024 // vae.patch_size
        latent = torch.empty(1, vae.latent_channels, side, side, dtype=torch.bfloat16)
    found, planned = most_bytes(lambda: decoder(latent)), decoder_bytes(vae, 1024**2, 2)
    print(f"{name}: {found / 1e9:.3f} GB, planned {planned / 1e9:.3f} GB")
    assert found <= planned <= 2 * found


def test_cheaper_suffixes_get_larger_batches() -> None:
    sizes = plan_of(costs_of("infinity_2b"), 70 * GIB).suffix_images
    assert set(sizes) == set(PAPER_STRATEGIES)
    assert sizes["base"] <= sizes["skip_1"] <= sizes["skip_2"] and sizes["base"] < sizes["uncond_3"]


@pytest.mark.parametrize("name", ["infinity_125m", "infinity_2b", "infinity_8b", "emoji"])
@pytest.mark.parametrize("known", [None, "base", "uncond_3", "skip_3"])
@pytest.mark.parametrize("free", [None, 20 * GIB, 70 * GIB])
@pytest.mark.parametrize("batch_size", [None, 1, 64])
def test_every_batch_fits_the_cache_and_the_memory(
    name: str, known: str | None, free: int | None, batch_size: int | None
) -> None:
    """Also those of a given batch size."""
    costs = costs_of(name, known)
    plan = plan_of(costs, free, batch_size=batch_size, device="cuda" if free else "cpu")
    for strategy in costs.strategies:
        if costs.has_suffix(strategy):
            assert plan.suffix_images[strategy.name] * costs.cached_tokens(strategy) <= plan.cache_tokens
    assert plan.prefix_images * BRANCHES * costs.prefix_tokens <= plan.cache_tokens
    assert plan.prefix_images <= plan.pool_images and max(plan.suffix_images.values()) <= (batch_size or 64)
    if known is not None:
        assert plan.prefix_images == plan.suffix_images[known]
    if free is not None:
        pool_bytes = plan.pool_images * (costs.waiting_bytes + costs.text_bytes)
        assert plan.cache_tokens * costs.bytes_per_token + pool_bytes < plan.planned_bytes <= free


def test_given_sizes_are_taken_where_they_fit() -> None:
    plan = plan_of(costs_of("emoji"), None, batch_size=5, pool_images=3, device="cpu")
    assert plan.prefix_images == 5 and set(plan.suffix_images.values()) == {5} and plan.pool_images == 5
    plan = plan_of(costs_of("infinity_2b"), 70 * GIB, pool_images=12)
    assert plan.pool_images == 12
    plan = plan_of(costs_of("infinity_2b"), 70 * GIB, pool_images=1000)
    assert 20 < plan.pool_images < 60 and plan.planned_bytes <= 70 * GIB
