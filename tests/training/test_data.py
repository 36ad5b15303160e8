"""The training pictures and captions."""

from pathlib import Path

import pytest
import torch

from skipvar.errors import InputError
from skipvar.training.backgrounds import BACKGROUNDS, COLORS, PATTERNS, Background, paint
from skipvar.training.data import (
    LAYOUT_SIDES,
    Combination,
    Pictures,
    all_combinations,
    captions,
    split_combinations,
)
from skipvar.training.judge import Judge, Prompt, make_prompts, measure_fidelity
from skipvar.training.objects import OBJECTS
from skipvar.training.recipe import Recipe


@pytest.fixture(scope="module")
def pictures(packages: Path) -> Pictures:
    return Pictures(packages, 128, torch.device("cpu"))


def test_split_is_fixed_by_the_seed_and_leaves_nothing_out() -> None:
    training, held_out = split_combinations(Recipe(seed=3))
    assert len(held_out) == Recipe().held_out_combinations
    assert sorted(training + held_out) == all_combinations()
    assert (training, held_out) == split_combinations(Recipe(seed=3))
    assert held_out != split_combinations(Recipe(seed=4))[1]
    assert {c.layout_index for c in held_out} == set(range(len(LAYOUT_SIDES)))


def test_object_names_are_unique() -> None:
    names = [name for listing in OBJECTS.values() for name, _ in listing]
    assert len(set(names)) == len(names)


def test_captions_name_object_background_and_layout() -> None:
    index = list(OBJECTS).index("apple")
    blue = BACKGROUNDS.index(Background("blue", "plain"))
    texts = [captions(Combination(index, blue, layout)) for layout in range(3)]
    assert "a large red apple on a blue background" in texts[0]
    assert "an apple on blue" in texts[0]
    assert "four apples in a grid on blue" in texts[1]
    assert "nine small apples on a blue background" in texts[2]
    assert all(len(set(t)) == len(t) for t in texts)
    assert "a unicorn on blue" in captions(Combination(list(OBJECTS).index("unicorn_face"), 4, 0))


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("striped", ("on red stripes", "on a striped red background", "on a red striped background")),
        ("dotted", ("on red dots", "on red polka dots", "on a dotted red background")),
        ("checked", ("on red checks", "on a checked red background", "on a red checkered background")),
        ("confetti", ("on red confetti", "on a red background with confetti")),
    ],
)
def test_captions_say_a_pattern_as_people_do(pattern: str, places: tuple[str, ...]) -> None:
    panda = list(OBJECTS).index("panda_face")
    texts = captions(Combination(panda, BACKGROUNDS.index(Background("red", pattern)), 0))
    assert {f"a panda {place}" for place in places} <= set(texts)


def test_patterns_have_two_colors_and_a_fixed_phase() -> None:
    for background in BACKGROUNDS:
        painted = paint(background, 128)
        assert torch.equal(painted, paint(background, 128))
        first = torch.tensor(COLORS[background.color])[:, None, None]
        share = float((painted == first).all(dim=0).float().mean())
        assert share == 1 if background.pattern == "plain" else 0.25 < share < 0.95, background
    assert len({paint(background, 128).numpy().tobytes() for background in BACKGROUNDS}) == len(COLORS) * len(PATTERNS)


def test_composes_on_the_background_without_a_fringe(pictures: Pictures) -> None:
    combinations = [Combination(5, b, layout) for b in range(len(COLORS)) for layout in range(3)]
    images = pictures.compose(combinations)
    assert images.shape == (24, 3, 128, 128)
    assert images.min() >= -1
    assert images.max() <= 1
    for image, combination in zip(images, combinations, strict=True):
        color = torch.tensor(list(COLORS.values())[combination.background_index]) / 127.5 - 1
        torch.testing.assert_close(image[:, 0, 0], color)
        # Premultiplied resizing: every pixel lies between the background and the disc's own colour (Lanczos rings).
        own = pictures.layers[5 * 3, :3, 60, 50].float() / 127.5 - 1
        low, high = torch.minimum(color, own), torch.maximum(color, own)
        assert (image >= low[:, None, None] - 0.3).all()
        assert (image <= high[:, None, None] + 0.3).all()


def test_says_what_to_do_when_the_packages_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train_emoji data"):
        Pictures(tmp_path, 128, torch.device("cpu"))


def test_judge_recognises_the_pictures_themselves_and_their_faults(pictures: Pictures) -> None:
    prompts = make_prompts(split_combinations(Recipe())[1], 12)
    combinations = [p.combination for p in prompts]
    images = pictures.compose(combinations)
    judge = Judge(pictures)
    right = measure_fidelity(images, prompts, judge)
    assert right["background"] == right["pattern"] == right["layout"] == right["top5"] == 1
    print(right)

    def asked(**change: int) -> list[Prompt]:
        return [Prompt(Combination(**{**c.__dict__, **change}), "", 0) for c in combinations]

    assert measure_fidelity(images, asked(background_index=0), judge)["background"] < 0.5
    assert measure_fidelity(images, asked(layout_index=2), judge)["layout"] < 0.6
    assert measure_fidelity(images, asked(object_index=0), judge)["top1"] < 0.2
