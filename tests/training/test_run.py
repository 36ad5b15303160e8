"""A whole training run in miniature: autoencoder, latents, transformer, export, the pipeline, restore."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipvar.cli import train_emoji
from skipvar.config import ModelSection
from skipvar.engine.sampler import Sampler, Step
from skipvar.engine.twin import generate_one
from skipvar.errors import InputError
from skipvar.model.bsq import next_input, quantize, running_sums
from skipvar.model.pipeline import Pipeline, load_pipeline
from skipvar.model.text_encoder import T5TextEncoder
from skipvar.skip.strategy import Mode
from skipvar.training import transformer as transformer_training
from skipvar.training import vae as vae_training
from skipvar.training.backgrounds import BACKGROUNDS, PATTERNS
from skipvar.training.common import Folders, load_checkpoint
from skipvar.training.data import all_combinations, captions, split_combinations
from skipvar.training.evaluate import evaluate
from skipvar.training.export import export, load_exported_autoencoder
from skipvar.training.parallel import Peers
from skipvar.training.recipe import (
    GRIDS,
    MODEL,
    NUM_SCALES,
    EvaluationRecipe,
    Lesson,
    RateSchedule,
    Recipe,
    StepKind,
    TransformerRecipe,
    VaeRecipe,
)
from skipvar.training.start import restore
from skipvar.training.text import CaptionTokens, build_tokenizer
from skipvar.training.trainer import Trainer, rate_factor
from skipvar.training.vae import encode_latents, encoder_sha256, load_autoencoder
from skipvar.types import Request

RECIPE = Recipe(
    held_out_combinations=len(all_combinations()) - 4,
    vae=VaeRecipe(batch_size=1, report_pictures=1),
    transformer=TransformerRecipe(
        early=StepKind(num_scales=3, batch_size=2),
        full=StepKind(num_scales=NUM_SCALES, batch_size=1),
        lessons=(Lesson(first_step=0, kinds=("early", "full")),),
    ),
)


@pytest.fixture(scope="module")
def folders(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A run of two steps of each network."""
    folders = Folders(packages=packages, run=tmp_path_factory.mktemp("run"))
    vae = vae_training.VaeTrainer(RECIPE, folders, Peers())
    for _ in range(2):
        vae.train_step(1.0)
    vae.save()
    vae.report()
    encode_latents(RECIPE, folders)
    trainer = transformer_training.TransformerTrainer(RECIPE, folders, is_compiled=False, peers=Peers())
    for _ in range(2):
        trainer.train_step(1.0)
    trainer.save()
    trainer.report()
    return folders


@pytest.fixture(scope="module")
def exported(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "emoji"
    export(RECIPE, folders, folder)
    return folder


def test_latents_are_those_of_the_training_pictures(folders: Folders) -> None:
    latents = load_checkpoint(folders.run, "encode")["latents"]
    assert latents.shape == (len(split_combinations(RECIPE)[0]), 32, 16, 16)
    assert latents.dtype == torch.float16


def test_batches_hold_what_generation_will_see(folders: Folders) -> None:
    """Without flips, inputs and targets are the latent's own bits and running sums."""
    recipe = Recipe(
        held_out_combinations=RECIPE.held_out_combinations, transformer=TransformerRecipe(max_flip_probability=0.0)
    )
    trainer = transformer_training.TransformerTrainer(recipe, folders, is_compiled=False, peers=Peers())
    batch = trainer.source.draw(recipe.transformer.lesson(0), NUM_SCALES, 2, torch.Generator().manual_seed(0))
    latents = load_checkpoint(folders.run, "encode")["latents"].float()

    def agrees(latent: Tensor, row: int) -> bool:
        bits = quantize(latent[None], GRIDS).targets
        if not torch.equal(torch.cat(bits, dim=1)[0].float(), batch.targets[row]):
            return False
        sums = running_sums(bits, GRIDS, False, GRIDS[-1])
        inputs = [next_input(s, grid, False)[0] for s, grid in zip(sums, GRIDS[1:], strict=False)]
        return all(torch.equal(a, b[row]) for a, b in zip(inputs, batch.codes, strict=True))

    for row in range(2):
        assert any(agrees(latent, row) for latent in latents)


def test_batches_follow_the_recipe_s_shares(folders: Folders) -> None:
    training, _ = split_combinations(RECIPE)
    pattern, layout = BACKGROUNDS[training[0].background_index].pattern, training[0].layout_index
    lesson = Lesson(
        first_step=0,
        kinds=("full",),
        pattern_shares=tuple(float(name == pattern) for name in PATTERNS),
        layout_shares=tuple(float(place == layout) for place in range(3)),
    )
    tokenizer = build_tokenizer()
    recipe = replace(RECIPE, transformer=replace(RECIPE.transformer, lessons=(lesson,)))
    source = transformer_training.BatchSource(recipe, folders, CaptionTokens(tokenizer), torch.device("cpu"))
    batch = source.draw(lesson, 1, 32, torch.Generator().manual_seed(0))
    asked = [c for c in training if (BACKGROUNDS[c.background_index].pattern, c.layout_index) == (pattern, layout)]
    known = {tuple(tokenizer(text)["input_ids"]) for combination in asked for text in captions(combination)}
    drawn = {tuple(row[:length].tolist()) for row, length in zip(batch.ids, batch.lengths, strict=True)}
    assert len(drawn) > 1 and drawn <= known


def test_resumes_as_if_never_stopped(folders: Folders) -> None:
    """Two steps, stop, one step = three steps."""

    def one_more(trainer: transformer_training.TransformerTrainer) -> dict[str, Tensor]:
        trainer.train_step(1.0)
        return {name: p.detach() for name, p in trainer.model.named_parameters()}

    whole = transformer_training.TransformerTrainer(RECIPE, folders, is_compiled=False, peers=Peers())
    for _ in range(2):
        whole.train_step(1.0)
    resumed = transformer_training.TransformerTrainer(RECIPE, folders, is_compiled=False, peers=Peers())
    resumed.restore()
    assert (resumed.step, resumed.num_samples) == (2, {"early": 2, "full": 1})
    expected, found = one_more(whole), one_more(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_teacher_forcing_gives_the_logits_of_generation(folders: Folders, make_request: Callable[..., Request]) -> None:
    """All scales at once under the mask = scale by scale with a cache: what is trained is what is run."""
    model = transformer_training.load_text_to_bits(RECIPE, folders)
    trainer = transformer_training.TransformerTrainer(RECIPE, folders, is_compiled=False, peers=Peers())
    pipeline = Pipeline(
        config=MODEL,
        transformer=model.transformer.requires_grad_(False),
        decoder=load_autoencoder(folders).decoder,
        text_encoder=T5TextEncoder(build_tokenizer(), model.text_encoder, max_tokens=64),
        dtype=torch.float32,
        device=torch.device("cpu"),
        weights_sha256={},
    )
    sampler = Sampler(pipeline)
    prompts = ["apple on red", "nine small keys on a blue background"]
    plain: dict[str, object] = {"cfg": (1.0,) * NUM_SCALES, "tau": (1.0,) * NUM_SCALES, "negative_prompt": None}
    codes, targets, entropies = [], [], []
    for position, prompt in enumerate(prompts):
        image = sampler.start_image(make_request(position, prompt=prompt, **plain))
        cache = sampler.new_cache(680)
        cache.begin(1, 680)
        batch = sampler.begin([image], cache)
        every = range(NUM_SCALES)
        steps = list(sampler.run(batch, [Mode.GUIDED] * NUM_SCALES, keep_sums=every))
        codes.append([next_input(batch.history[k], grid, False) for k, grid in enumerate(GRIDS[1:])])
        targets.append(torch.cat([step.bits for step in steps], dim=1).float())
        entropies.append(torch.stack([_cross_entropy(step) for step in steps]))
    ids, lengths = trainer.tokens.batch(prompts)
    both = [torch.cat(pair) for pair in zip(*codes, strict=True)]
    guided = torch.zeros(2, dtype=torch.bool)
    objective = transformer_training.Objective(model, max_text_length=12, is_compiled=False)
    _, found = objective(transformer_training.TrainingBatch(ids, lengths, guided, both, torch.cat(targets)))
    torch.testing.assert_close(found, torch.stack(entropies).mean(dim=0), atol=1e-5, rtol=1e-4)


def _cross_entropy(step: Step) -> Tensor:
    """Of a step's own bits, in nats a bit."""
    chances = step.logits.unflatten(-1, (-1, 2)).log_softmax(dim=-1)
    return -chances.gather(-1, step.bits.long()[..., None]).mean()


def test_exported_folder_runs_in_the_pipeline(exported: Path, make_request: Callable[..., Request]) -> None:
    pipeline = load_pipeline(ModelSection(path=str(exported), dtype="float32", device="cpu"))
    assert generate_one(pipeline, make_request(0)).pixels.shape == (128, 128, 3)
    assert sum(f.stat().st_size for f in exported.rglob("*") if f.is_file()) < 30_000_000
    record = json.loads((exported / "training.json").read_text())
    assert record["transformer"]["step"] == 2
    assert "2 steps" in (exported / "README.md").read_text()


def test_evaluation_gives_one_document(folders: Folders, exported: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(exported, model)
    settings = EvaluationRecipe(num_prompts=6, batch_size=3)
    found = evaluate(replace(RECIPE, evaluation=settings), folders, model)
    assert json.loads(json.dumps(found)) == found
    fidelity = {"top1", "top5", "background", "pattern", "layout"}
    assert len(found["spread"]) == len(found["ssim_skip_median"]) == 3
    assert all(low <= high for low, high in found["spread"])
    shown = {BACKGROUNDS[c.background_index].pattern for c in split_combinations(RECIPE)[1][:6]}
    assert found["ssim_truncated"].keys() == found["ssim_skip_by_background"].keys() == shown
    assert {*fidelity, "psnr_single", "psnr_grid", "spearman_sobel", "spearman_fft", "ssim_skip"} <= found.keys()
    assert found["spearman_sobel"] == found["spearman_sobel_at_scale_6"][-1]
    assert all((model / name).is_file() for name in ("samples.png", "skipping.png"))


def test_evaluation_of_one_prompt_has_no_correlations(folders: Folders, exported: Path, tmp_path: Path) -> None:
    """They were NaN, which is no JSON."""
    model = tmp_path / "model"
    shutil.copytree(exported, model)
    found = evaluate(replace(RECIPE, evaluation=EvaluationRecipe(num_prompts=1)), folders, model)
    json.dumps(found, allow_nan=False)
    assert found["spearman_sobel"] is None and found["spearman_latents"] == [None] * 3
    assert len(found["ssim_skip"]) == 3


def test_restores_a_run_from_the_exported_folder(folders: Folders, exported: Path, tmp_path: Path) -> None:
    again = Folders(packages=folders.packages, run=tmp_path / "run")
    again.run.mkdir()
    restore(RECIPE, again, exported)
    encode_latents(RECIPE, again)
    trainer = transformer_training.TransformerTrainer(RECIPE, again, is_compiled=False, peers=Peers())
    trainer.restore()
    assert trainer.step == trainer.first_cold_step == 2
    original = transformer_training.load_text_to_bits(RECIPE, folders)
    for a, b in zip(original.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    vae = vae_training.VaeTrainer(RECIPE, again, Peers())
    vae.restore()
    for a, b in zip(load_exported_autoencoder(exported).parameters(), vae.model.parameters(), strict=True):
        assert torch.equal(a, b)
    export(RECIPE, again, tmp_path / "model")
    for name in ("transformer.safetensors", "vae.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (exported / name).read_bytes(), name
    record, before = (json.loads((folder / "training.json").read_text()) for folder in (tmp_path / "model", exported))
    history = ["The autoencoder goes on from step 2 of `emoji`.", "The transformer goes on from step 2 of `emoji`."]
    assert record == before | {"history": history} and before["history"] == []
    assert " ".join(history) in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(InputError, match="overwrite"):
        restore(RECIPE, again, exported)


def test_starts_from_anothers_checkpoints_with_words_matched_by_name(folders: Folders, tmp_path: Path) -> None:
    """Half precision, no optimizer's state, words in another order and one unknown; then another encoder's bits."""
    source, again = tmp_path / "source", Folders(packages=folders.packages, run=tmp_path / "run")
    source.mkdir()
    again.run.mkdir()
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    listing = json.loads((tmp_path / "tokenizer.json").read_text())
    pieces = [piece for piece in tokenizer.get_vocab() if piece not in ("\u0120panda", "\u0120checkered")]
    listing["model"]["vocab"] = {piece: row for row, piece in enumerate(pieces)}
    (source / "tokenizer.json").write_text(json.dumps(listing))
    embeddings = "text_encoder.shared.weight"
    for name in ("vae.pt", "transformer.pt"):
        state = torch.load(folders.run / name)
        for weights in (state["model"], state["ema"]["weights"]):
            for key, weight in weights.items():
                chosen = weight[[tokenizer.get_vocab()[p] for p in pieces]] if key == embeddings else weight
                weights[key] = chosen.detach().half()
        torch.save(state | {"optimizer": None}, source / name)
    restore(RECIPE, again, source)
    found, known = (torch.load(f / "transformer.pt")["ema"]["weights"] for f in (again.run, folders.run))
    rows = tokenizer.get_vocab()
    torch.testing.assert_close(
        found[embeddings][rows["\u0120koala"]], known[embeddings][rows["\u0120koala"]].half().float()
    )
    # A form of a known word starts as that word; an unknown one starts afresh.
    assert torch.equal(found[embeddings][rows["\u0120checkered"]], found[embeddings][rows["\u0120checked"]])
    assert found[embeddings][rows["\u0120panda"]].abs().sum() > 0
    # Its weights alone are a start for the bits of an autoencoder that has learned on.
    vae = vae_training.VaeTrainer(RECIPE, again, Peers())
    vae.restore()
    vae.train_step(1.0)
    vae.save()
    encode_latents(RECIPE, again)
    (again.run / "transformer.pt").unlink()
    restore(RECIPE, again, source, ("transformer",))
    transformer_training.check_encoder(again)
    trainer = transformer_training.TransformerTrainer(RECIPE, again, is_compiled=False, peers=Peers())
    trainer.restore()
    trainer.train_step(1.0)
    assert trainer.step == 3


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(file: Path) -> None:
    torch.save({"step": 3}, file)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("vae.pt", cut_short),
        ("vae.pt", without_weights),
        ("transformer.pt", cut_short),
        ("transformer.pt", without_weights),
        ("tokenizer.json", cut_short),
        ("vae.pt", lambda file: file.write_text("no checkpoint")),
    ],
)
def test_damaged_sources_are_told_in_a_sentence(
    folders: Folders, tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    source, again = tmp_path / "source", Folders(packages=folders.packages, run=tmp_path / "run")
    shutil.copytree(folders.run, source)
    again.run.mkdir()
    build_tokenizer().save_pretrained(source)
    damage(source / name)
    with pytest.raises(InputError, match=str(source)):
        restore(RECIPE, again, source)


def test_a_start_without_its_words_is_refused(folders: Folders, tmp_path: Path) -> None:
    source, again = tmp_path / "source", Folders(packages=folders.packages, run=tmp_path / "run")
    shutil.copytree(folders.run, source)
    again.run.mkdir()
    with pytest.raises(InputError, match=r"tokenizer.json is not there"):
        restore(RECIPE, again, source)


def test_rates_warm_up_and_decay() -> None:
    schedule = RateSchedule(num_steps=1000, warmup_steps=100, decay_steps=200)
    assert rate_factor(schedule, 0, 0) == 0.01
    assert rate_factor(schedule, 99, 0) == rate_factor(schedule, 800, 0) == 1
    assert rate_factor(schedule, 900, 0) == 0.5
    assert rate_factor(schedule, 999, 0) == 0.005
    assert rate_factor(schedule, 510, first_cold_step=510) == 0.01


class _CountingTrainer(Trainer):
    """Takes ten seconds of its leader's time a step."""

    make_optimizer = loss = None

    def __init__(self, step: int, checkpoint_seconds: float) -> None:
        self.step = self.first_cold_step = step
        self.schedule = RateSchedule(num_steps=10, warmup_steps=2, decay_steps=4)
        self.recipe, self.peers = Recipe(checkpoint_seconds=checkpoint_seconds), self
        self.is_leader = True
        self.factors: list[float] = []
        self.said: list[str] = []

    def train_step(self, factor: float) -> None:
        self.step += 1
        self.factors.append(factor)

    def hear_leader(self, seconds_left: float) -> float:
        return seconds_left - 10 * len(self.factors)

    def restore(self) -> None:
        pass

    def report(self) -> None:
        self.said.append("report")

    def save(self) -> None:
        self.said.append("save")


@pytest.mark.parametrize(("minutes", "steps"), [(math.inf, 6), (0.51, 4), (0.0, 1)])
def test_trains_to_the_last_step_or_for_so_long(minutes: float, steps: int) -> None:
    trainer = _CountingTrainer(step=4, checkpoint_seconds=100)
    trainer.train(minutes)
    assert trainer.factors == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25][:steps]
    assert trainer.said == ["report", "save"]
    trainer.step = 10
    trainer.train(minutes)
    assert len(trainer.factors) == steps


def test_a_checkpoint_due_at_the_last_step_is_made_once() -> None:
    trainer = _CountingTrainer(step=8, checkpoint_seconds=0)
    trainer.train(math.inf)
    assert trainer.said == ["report", "save"] * 2


def test_processes_stay_in_step_and_go_on_as_if_never_stopped(folders: Folders, tmp_path: Path) -> None:
    """Three steps at once = one step, an end by the clock, and two more; the autoencoder's in two processes.

    The second process goes on from what the first has saved: weights that had drifted apart would show. The last two
    steps train the decoder alone.
    """
    runs = [Folders(packages=folders.packages, run=tmp_path / name) for name in ("whole", "stopped")]
    recipe = replace(
        RECIPE,
        vae=replace(RECIPE.vae, batch_size=2, encoder_steps=1, schedule=RateSchedule(num_steps=3, decay_steps=1)),
        transformer=replace(
            RECIPE.transformer,
            full=StepKind(num_scales=2, batch_size=2),
            schedule=RateSchedule(num_steps=3, decay_steps=1),
        ),
    )
    for run, stops in zip(runs, ([math.inf], [0.0, math.inf]), strict=True):
        run.run.mkdir()
        for minutes in stops:
            vae_training.train_vae(recipe, run, minutes, num_processes=2)
        encode_latents(recipe, run)
        for minutes in stops:
            transformer_training.train_transformer(recipe, run, minutes, num_processes=1, is_compiled=False)
    for name in ("vae.pt", "transformer.pt"):
        whole, stopped = (torch.load(run.run / name) for run in runs)
        assert whole["step"] == stopped["step"] == 3
        assert all(torch.equal(w, stopped["model"][key]) for key, w in whole["model"].items()), name
        assert all(torch.equal(w, stopped["ema"]["weights"][key]) for key, w in whole["ema"]["weights"].items()), name


def test_the_last_steps_train_the_decoder_alone(folders: Folders, tmp_path: Path) -> None:
    """A picture's bits stay what they were at the end of the encoder's steps, in what is exported too."""
    again = Folders(packages=folders.packages, run=tmp_path / "run")
    recipe = replace(RECIPE, vae=replace(RECIPE.vae, encoder_steps=2))
    trainer = vae_training.VaeTrainer(recipe, again, Peers())
    for _ in range(2):
        trainer.train_step(1.0)
    trainer.save()
    before = load_autoencoder(again)
    for _ in range(2):  # as often as it is started again
        trainer = vae_training.VaeTrainer(recipe, again, Peers())
        trainer.restore()
        trainer.train_step(1.0)
        trainer.save()
    after = load_autoencoder(again)
    assert encoder_sha256(after.encoder) == encoder_sha256(before.encoder) == encoder_sha256(trainer.model.encoder)
    assert all(
        not torch.equal(a, b) for a, b in zip(after.decoder.parameters(), before.decoder.parameters(), strict=True)
    )


def test_a_run_that_trained_both_halves_to_its_end_goes_on_with_the_decoder(folders: Folders, tmp_path: Path) -> None:
    """Its optimizer knows both: the decoder's starts cold."""
    again = Folders(packages=folders.packages, run=tmp_path / "run")
    shutil.copytree(folders.run, again.run)
    trainer = vae_training.VaeTrainer(replace(RECIPE, vae=replace(RECIPE.vae, encoder_steps=2)), again, Peers())
    trainer.restore()
    trainer.train_step(1.0)
    assert (trainer.step, trainer.first_cold_step) == (3, 2)


def test_refuses_parts_that_do_not_belong_together(folders: Folders, exported: Path, tmp_path: Path) -> None:
    """A new encoder: neither its latents nor the transformer's weights fit it; what was exported stays."""
    again = Folders(packages=folders.packages, run=tmp_path / "run")
    shutil.copytree(folders.run, again.run)
    vae = vae_training.VaeTrainer(RECIPE, again, Peers())
    vae.restore()
    vae.train_step(1.0)
    vae.save()
    before = (exported / "vae.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"latents.pt was made by another encoder"):
        export(RECIPE, again, exported)
    encode_latents(RECIPE, again)
    with pytest.raises(InputError, match=r"transformer.pt has learned the bits of another encoder"):
        export(RECIPE, again, exported)
    assert (exported / "vae.safetensors").read_bytes() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_on_a_gpu(packages: Path, tmp_path: Path) -> None:
    """All stages in miniature on the device that `run_peers` finds, compiled and in bfloat16; then export as ever."""
    folders = Folders(packages=packages, run=tmp_path / "run")
    folders.run.mkdir()
    short = RateSchedule(num_steps=3, decay_steps=1)
    recipe = replace(
        RECIPE, vae=replace(RECIPE.vae, schedule=short), transformer=replace(RECIPE.transformer, schedule=short)
    )
    vae_training.train_vae(recipe, folders, math.inf, num_processes=2)
    encode_latents(recipe, folders)
    transformer_training.train_transformer(recipe, folders, math.inf, num_processes=2, is_compiled=True)
    export(recipe, folders, tmp_path / "model")
    assert torch.load(folders.run / "transformer.pt")["step"] == 3


def test_kinds_of_steps_follow_the_pattern_in_force() -> None:
    lessons = Lesson(first_step=0, kinds=("coarse", "full")), Lesson(first_step=4, kinds=("full", "early", "full"))
    recipe = TransformerRecipe(lessons=lessons)
    assert [recipe.kind(step) for step in range(8)] == ["coarse", "full"] * 2 + ["early", "full", "full", "early"]


def _without_a_matrix(state: dict) -> None:
    state["model"].pop("decoder.conv_in.weight")


def _of_other_sizes(state: dict) -> None:
    state["model"]["decoder.conv_in.weight"] = torch.zeros(3)


def _of_another_optimizer(state: dict) -> None:
    state["optimizer"]["muon"].pop()


@pytest.mark.parametrize(
    ("change", "num_processes"),
    [(dict.clear, 1), (_without_a_matrix, 1), (_of_other_sizes, 1), (_of_another_optimizer, 1), (_without_a_matrix, 2)],
)
def test_a_checkpoint_of_another_network_is_refused_in_a_sentence(
    folders: Folders, tmp_path: Path, change: Callable[[dict], None], num_processes: int
) -> None:
    """They ended in a traceback, of another process where there were two."""
    again = Folders(packages=folders.packages, run=tmp_path)
    state = torch.load(folders.run / "vae.pt")
    change(state)
    torch.save(state, tmp_path / "vae.pt")
    with pytest.raises(InputError, match=r"vae.pt: its weights cannot be used .* move it away to begin anew"):
        vae_training.train_vae(RECIPE, again, 0.0, num_processes)


def test_a_stage_before_its_turn_is_told_in_one_sentence(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["encode", "--packages", str(folders.packages), "--run", str(tmp_path / "run")]
    assert train_emoji.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/run/vae.pt is not there: `python -m jobs.train_emoji vae` makes it\n"
    )
    assert not (tmp_path / "run").exists()
