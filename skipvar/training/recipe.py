"""Every number of the embedded model's training in one place; the model's sizes are the preset's."""

from dataclasses import dataclass, field

from skipvar.model.presets import EMOJI as MODEL
from skipvar.model.schedules import find_schedule

SCHEDULE = find_schedule(MODEL.schedules, aspect_ratio=1.0, size=None)
GRIDS = SCHEDULE.grids
NUM_SCALES = len(GRIDS)


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """Sizes of the tiny T5 text encoder; its width is `MODEL.transformer.text_width`."""

    num_layers: int = 2
    num_heads: int = 4
    hidden_width: int = 512


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """Muon for the matrices and convolutions inside the networks, AdamW for the rest."""

    muon_rate: float
    muon_momentum: float = 0.95
    adam_rate: float
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float
    gradient_clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """Length of a training run, and the learning rates' course through it: linear warm-up, constant, linear decay."""

    num_steps: int
    warmup_steps: int = 100
    decay_steps: int
    """The last ones; the rate ends at zero."""


@dataclass(frozen=True, kw_only=True)
class VaeRecipe:
    """How the autoencoder is trained."""

    schedule: RateSchedule = RateSchedule(num_steps=16_000, decay_steps=2500)
    encoder_steps: int = 14_500
    """Later steps train the decoder alone: pictures get sharper, and their bits stay. The rate falls through both: what
    the encoder has learned is averaged (`ema_decay`) before it has come to rest."""
    batch_size: int = 8
    optimizer: OptimizerRecipe = OptimizerRecipe(muon_rate=2e-3, adam_rate=1e-3, weight_decay=1e-3)
    ema_decay: float = 0.998
    square_weight: float = 8.0
    """Of the mean squared distance, beside the mean absolute one: PSNR counts large errors most."""
    gradient_weight: float = 0.5
    """Of the L1 distance between the images' finite differences."""
    commitment_weight: float = 1.0
    """Of the squared distance between a latent and the codes that stand for it. At 0.25 latents grew out of the codes'
    reach (the sum over the scales of 1/sqrt(bits)), and one sign was all that such a cell could say."""
    layout_shares: tuple[float, ...] = (0.6, 0.8, 1.6)
    """Relative frequency of each layout's pictures: small objects are the hardest."""
    truncated_share: float = 0.04
    """Share of images decoded from a running sum that lacks the last one to three scales."""
    decoder_truncated_shares: tuple[float, ...] = (0.3, 0.3, 0.3, 0.0, 0.04)
    """The same while the decoder is trained alone, for each of `backgrounds.PATTERNS`. A decoder can learn to make up
    for what plain, striped and dotted pictures lack then, and for part of what checks lack; where it does not learn
    that, pictures differ more in how much they need their last scales, which is what a policy is about."""
    report_pictures: int = 24
    """Held-out pictures of each layout that a report measures."""


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """A training step that sees the first `num_scales` scales of `batch_size` images."""

    num_scales: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is trained, and shown how often, from a step on."""

    first_step: int
    kinds: tuple[str, ...]
    """Of consecutive steps, over and over."""
    pattern_shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    """Relative frequency of each of `backgrounds.PATTERNS`."""
    layout_shares: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Relative frequency of each layout."""


@dataclass(frozen=True, kw_only=True)
class TransformerRecipe:
    """How the transformer and its text encoder are trained."""

    schedule: RateSchedule = RateSchedule(num_steps=7200, decay_steps=700)
    # Three kinds of about 7,500 tokens each: what an object is is learned from few tokens of many images.
    coarse: StepKind = StepKind(num_scales=5, batch_size=128)
    early: StepKind = StepKind(num_scales=7, batch_size=48)
    full: StepKind = StepKind(num_scales=NUM_SCALES, batch_size=12)
    gpu_batch_factor: int = 4
    """On a GPU a step takes so many times the images: small ones leave it waiting for the launches of kernels."""
    lessons: tuple[Lesson, ...] = (
        Lesson(first_step=0, kinds=("coarse", "early", "full", "full")),
        # Confetti follows no rule: it is learned last, by the late scales, and hardest between many small objects.
        Lesson(
            first_step=4300,
            kinds=("full", "full", "full", "full", "full", "early"),
            pattern_shares=(0.6, 0.6, 0.6, 0.7, 7.5),
            layout_shares=(0.6, 1.0, 1.4),
        ),
        Lesson(
            first_step=4810,
            kinds=("full", "full", "full", "early", "full", "full", "full", "coarse"),
            pattern_shares=(1.0, 1.0, 1.0, 1.0, 2.0),
            layout_shares=(0.8, 1.0, 1.2),
        ),
    )
    """In the order of their first steps. Late scales count as well: skipping takes them away."""
    embedding_rate: float = 1e-2
    """AdamW's rate of the word embeddings: each word is seen rarely, and its vector starts at length 16."""
    optimizer: OptimizerRecipe = OptimizerRecipe(muon_rate=2.5e-3, adam_rate=2e-3, weight_decay=1e-2)
    ema_decay: float = 0.998
    max_flip_probability: float = 0.2
    """Bits of the input are flipped with a chance drawn from U(0, this) for each image."""
    text_dropout: float = 0.1

    def lesson(self, step: int) -> Lesson:
        """The one that a step belongs to."""
        return next(lesson for lesson in reversed(self.lessons) if step >= lesson.first_step)

    def kind(self, step: int) -> str:
        """Name of the kind of a step."""
        kinds = self.lesson(step).kinds
        return kinds[step % len(kinds)]


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """What `evaluate` generates and measures."""

    num_prompts: int = 300
    cfg: float = 2.0
    tau: float = 0.3
    top_p: float = 0.97
    top_k: int = 0
    batch_size: int = 20
    probe_scales: tuple[int, ...] = (4, 6, 9)
    """Scales on whose grids the probe is tried."""
    policy_scale: int = 6
    """The one of them on whose grid `spearman_sobel` and `spearman_fft` are reported."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole recipe; one `seed` fixes data order, held-out combinations and initial weights."""

    seed: int = 0
    image_side: int = 128
    held_out_combinations: int = 320
    """(object, background, layout) triples that no training step sees."""
    checkpoint_seconds: float = 120.0
    text: TextRecipe = field(default_factory=TextRecipe)
    vae: VaeRecipe = field(default_factory=VaeRecipe)
    transformer: TransformerRecipe = field(default_factory=TransformerRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
