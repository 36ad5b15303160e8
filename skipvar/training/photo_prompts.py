"""Prompts for photographic models, in sets of graded detail: portraits, animals and complex scenes."""

import random
from collections.abc import Iterator
from itertools import product

from skipvar.training.prompt_sets import ComposedPrompt

_PEOPLE = (
    "a young woman", "an old woman", "a woman in her forties", "a young man", "an old man", "a man with a grey beard",
    "a girl", "a boy", "a bride", "a street musician", "a chef", "a fisherman", "a dancer", "a violinist",
    "a carpenter",
)  # fmt: skip
_ANIMALS = (
    "a red fox", "a tabby cat", "a border collie", "an owl", "a peacock", "a tiger", "an elephant", "a chameleon",
    "a hummingbird", "a horse", "a wolf", "a parrot", "a sea turtle", "a highland cow", "a hedgehog",
)  # fmt: skip
_SCENES = (
    "a crowded market street", "a gothic cathedral", "a library with a thousand books", "a harbour full of boats",
    "a greenhouse of tropical plants", "a watchmaker's workbench", "a carnival parade", "an old factory hall",
    "a terraced hillside village", "a coral reef", "a flea market stall", "a botanical still life", "a city from above",
    "a spice shop", "an autumn forest with a stream",
)  # fmt: skip
_PLACES = {
    "plain": (
        "in front of a white wall", "against a clear blue sky", "on a grey studio backdrop", "in thick fog",
        "on fresh snow", "in soft evening light, background out of focus",
    ),
    "high": (
        "surrounded by dense foliage", "in heavy rain with splashing drops", "among thousands of fallen leaves",
        "before a wall of mosaic tiles", "in a field of wild flowers", "under a tree full of cherry blossoms",
    ),
}  # fmt: skip
_TEXTURES = {
    "plain": ("smooth skin and simple shapes", "few details", "soft shadows", "large even surfaces"),
    "high": (
        "every hair and thread in sharp focus", "intricate lace and embroidery", "weathered wood and peeling paint",
        "glittering beads and filigree", "deep wrinkles and rough stone", "countless tiny lights",
    ),
}  # fmt: skip
_STYLES = {
    "plain": ("minimalist photograph", "soft studio portrait", "pastel illustration", "high-key photograph"),
    "high": (
        "macro photograph", "hyperrealistic photograph, 8k", "baroque oil painting", "detailed ink drawing",
        "documentary photograph with film grain", "mosaic of tiny tiles",
    ),
}  # fmt: skip
_SUBJECTS = {"people": _PEOPLE, "animals": _ANIMALS, "scenes": _SCENES}


def compose_photos(detail: str, count: int, seed: int) -> list[ComposedPrompt]:
    """`count` different prompts, by seed: `plain` asks for little detail in place, texture and style, `high` for much
    in all of them, `mixed` for much in one or two."""
    return random.Random(f"photo|{detail}|{seed}").sample(list(_all_of(detail)), count)


def _all_of(detail: str) -> Iterator[ComposedPrompt]:
    grades = ("plain", "high")
    for kind, subjects in _SUBJECTS.items():
        for subject, of_place, of_texture, of_style in product(subjects, grades, grades, grades):
            wanted = {of_place, of_texture, of_style}
            if wanted != ({detail} if detail in grades else set(grades)):
                continue
            for place, texture, style in product(_PLACES[of_place], _TEXTURES[of_texture], _STYLES[of_style]):
                yield ComposedPrompt(f"{style} of {subject} {place}, {texture}", kind)
