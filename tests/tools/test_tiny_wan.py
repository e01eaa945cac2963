"""The tiny Wan: its training data, its text encoder, its VAE and DiT, and what the shipped files can do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wan_parallel.tools.tiny_wan.classifier import Scene, classify, prompted
from wan_parallel.tools.tiny_wan.dit import TrainableWan
from wan_parallel.tools.tiny_wan.files import join, load_state, read, save_shipped, save_state
from wan_parallel.tools.tiny_wan.judging import (
    T2V_FILE,
    VAE_FILE,
    Sampling,
    decode,
    held_out_cases,
    judge,
    reconstruction,
    sample,
    table,
)
from wan_parallel.tools.tiny_wan.scenes import Combination, combinations, draw_scenes, generator, render
from wan_parallel.tools.tiny_wan.t2v_training import WordVectors
from wan_parallel.tools.tiny_wan.vae import WanVAE, load_vae, normalise
from wan_parallel.wanvideo.attention.kernels import get_kernel
from wan_parallel.wanvideo.base.config import WanConfig
from wan_parallel.wanvideo.example import tiny_text
from wan_parallel.wanvideo.model.model import WanModel
from wan_parallel.wanvideo.model.text_keys import TextKeys

SMALL = WanConfig(dim=256, ffn_dim=320, num_heads=2, num_layers=2)
PROMPT = "a red circle moves right over a blue background"
FIRST_NUMBERS = [0.5, 1.5, 2.5, -1.5, 1.5, -2.5, 0.5, -0.5]  # of the word a, as first shipped

shipped = pytest.mark.skipif(
    not (T2V_FILE.is_file() and VAE_FILE.is_file()),
    reason=f"{T2V_FILE.name} and {VAE_FILE.name} are not in example_workflows/models",
)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    """Random weights, two channels wide; every parameter shows in the output."""
    torch.manual_seed(0)
    vae = WanVAE(2).eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 4 and parameter.shape[1] == 1), std=0.2)
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return render(draw_scenes(generator(3, "test"), 2), frames=9, size=32)


# text


def test_the_text_encoder_gives_the_same_numbers_on_every_machine():
    embedding = tiny_text.encode(PROMPT)
    assert embedding.shape == (512, 4096) and embedding.dtype == torch.float32
    assert embedding[0, :8].tolist() == FIRST_NUMBERS
    assert not embedding[9:].any()
    assert torch.equal(embedding, embedding.half().float()) and torch.equal(embedding, embedding.bfloat16().float())


def test_an_empty_prompt_is_all_zeros():
    assert not tiny_text.encode("").any()
    assert not tiny_text.encode(" . ").any()


def test_case_and_full_stops_do_not_matter():
    assert torch.equal(tiny_text.encode(PROMPT), tiny_text.encode(PROMPT.capitalize() + "."))


def test_a_word_has_another_vector_in_another_place_and_beside_other_words():
    red = tiny_text.encode_words(["red", "circle"])[0]
    assert not torch.equal(red, tiny_text.encode_words(["red", "background"])[0])
    assert not torch.equal(red, tiny_text.encode_words(["a", "red", "circle"])[1])


def test_an_unknown_word_gets_two_sentences_with_all_known_words():
    with pytest.raises(ValueError, match=r'does not know "pink", "cat"\. Write .*\.$') as error:
        tiny_text.encode("a pink cat moves, moves up over a pink background")
    assert all(word in str(error.value) for word in tiny_text.VOCABULARY)


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="513 words"):
        tiny_text.encode("a " * 513)


def test_the_training_reads_captions_as_the_text_encoder_does():
    captions = [PROMPT, "a white square moves up and left and a cyan circle moves down over a black background"]
    vectors = WordVectors(torch.device("cpu"), torch.float32)
    batch = vectors(vectors.indices(captions))
    for caption, row in zip(captions, batch, strict=True):
        words = caption.split()
        assert torch.equal(row[: len(words)], tiny_text.encode_words(words))


# data and classifier


def test_a_seed_draws_the_same_clips_again_and_another_seed_does_not():
    first, again, other = (render(draw_scenes(generator(seed, "test"), 3), frames=5, size=16) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_training_clips_never_show_a_held_out_combination():
    held_out = set(combinations(True))
    assert 0.05 < len(held_out) / (len(held_out) + len(combinations(False))) < 0.15
    for caption in draw_scenes(generator(0, "test"), 400).captions():
        subjects, background = caption.removesuffix(" background").split(" over a ")
        for subject in subjects.split(" and a "):
            colour_and_shape, motion = subject.removeprefix("a ").split(" moves ")
            assert Combination(*colour_and_shape.split(), motion, background) not in held_out


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_the_classifier_reads_real_clips(pairs: float):
    verdicts = []
    for scenes in draw_scenes(generator(1, "classifier"), 60, held_out=True, pairs=pairs).split(15):
        found = [classify(clip) for clip in render(scenes)]
        verdicts += [scene == prompted(c) for scene, c in zip(found, scenes.captions(), strict=True)]
    assert sum(verdicts) >= 0.95 * len(verdicts)


def test_the_classifier_sees_a_wrong_direction_and_a_still_shape():
    clip = render(draw_scenes(generator(5, "test"), 1, pairs=0.0))[0]
    scene = classify(clip)
    backwards = classify(clip.flip(1))
    still = classify(clip[:, :1].expand(-1, 17, -1, -1))
    assert backwards.motions.keys() == scene.motions.keys() and backwards.motions != scene.motions
    assert set(still.motions.values()) == {"still"}


def test_the_classifier_finds_nothing_in_noise():
    assert classify(torch.randn(3, 17, 64, 64, generator=torch.Generator().manual_seed(0))).motions == {}


def test_a_prompt_says_what_is_asked_for():
    prompt = "a red circle moves up and left and a green square moves down over a blue background"
    assert prompted(prompt) == Scene("blue", {"red": "up and left", "green": "down"})
    with pytest.raises(ValueError, match="names no background"):
        prompted("a red circle moves up")


# VAE


def test_the_vae_sees_no_later_frames(vae: WanVAE, video: torch.Tensor):
    whole = vae.encode(video)
    assert whole.shape == (2, 16, 3, 4, 4)
    for frames in (1, 5):
        assert relative_error(vae.encode(video[:, :, :frames]), whole[:, :, : 1 + frames // 4]) < 1e-5
    decoded = vae.decode(whole)
    assert decoded.shape == video.shape
    for latents in (1, 2):
        assert relative_error(vae.decode(whole[:, :, :latents]), decoded[:, :, : 4 * latents - 3]) < 1e-5


def test_folding_gives_the_latents_wans_statistics_and_changes_no_video(vae: WanVAE, video: torch.Tensor):
    folded = WanVAE(2).eval().requires_grad_(False)
    folded.load_state_dict(vae.state_dict())
    latent = vae.encode(video)
    std = latent.std((0, 2, 3, 4))
    folded.fold_statistics(latent.mean((0, 2, 3, 4)), std)
    normalised = normalise(folded.encode(video))
    assert normalised.mean((0, 2, 3, 4)).abs().max() < 1e-4
    used = std > 0.25 * std.max()
    assert used.any() and (normalised.std((0, 2, 3, 4)) <= 1 + 1e-4).all()
    assert relative_error(folded.decode(folded.encode(video)), vae.decode(latent)) < 1e-4


def test_diffusers_loads_the_vae_from_its_file_and_agrees(vae: WanVAE, video: torch.Tensor, tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", "base_dim": vae.width}))
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    other = diffusers.AutoencoderKLWan.from_single_file(str(tmp_path / "vae.safetensors"), config=str(tmp_path))
    latent = other.encode(video).latent_dist.mode()
    assert relative_error(vae.encode(video), latent) < 1e-5
    assert relative_error(vae.decode(latent).clamp(-1, 1), other.decode(latent).sample) < 1e-5


# DiT


def test_the_model_that_trains_is_the_model_that_runs():
    torch.manual_seed(0)
    trained = TrainableWan(SMALL).requires_grad_(False)
    for parameter in trained.parameters():
        columns = parameter[0].numel() if parameter.ndim > 1 else 10
        torch.nn.init.normal_(parameter, std=columns**-0.5)
    model = WanModel(SMALL, get_kernel("sdpa", torch.device("cpu"), torch.float32))
    model.load_state_dict(trained.state_dict())
    x, time = torch.randn(2, 16, 3, 4, 6), torch.tensor([900.0, 30.0])
    context = torch.stack([tiny_text.encode(PROMPT), tiny_text.encode("")])
    words = context[:, :12].clone()
    words[1] = 7.0  # behind the end of a caption: must not matter
    ours = trained(x, time, words, torch.tensor([9, 0]))
    assert relative_error(ours, model(x, time, context)) < 1e-5


def test_a_file_in_parts_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = {f"w{i}": torch.randn(10, 10) for i in range(5)}
    monkeypatch.setitem(save_shipped.__globals__, "PART_BYTES", 500)
    paths = save_shipped(tmp_path, "tiny", weights, {"data_seed": 1})
    join(tmp_path / "tiny", tmp_path / "whole.safetensors")
    tensors, facts = read(tmp_path / "whole.safetensors")
    assert len(paths) == 3
    assert facts["licence"] == "Apache-2.0" and facts["data_seed"] == "1"
    assert all(torch.equal(tensors[key], weights[key].half()) for key in weights)


def test_a_training_state_comes_back(tmp_path: Path):
    groups = {"model": {"a.weight": torch.randn(3)}, "moments": {"0.step": torch.tensor(4.0)}}
    save_state(tmp_path / "state.safetensors", groups, {"steps": 4})
    loaded, facts = load_state(tmp_path / "state.safetensors")
    assert facts == {"steps": "4"} and torch.equal(loaded["model"]["a.weight"], groups["model"]["a.weight"])


# the shipped files


@shipped
def test_the_shipped_files_are_small_and_say_what_they_are():
    assert T2V_FILE.stat().st_size + VAE_FILE.stat().st_size <= 40e6
    for path in (T2V_FILE, VAE_FILE):
        _, facts = read(path)
        assert facts["licence"] == "Apache-2.0"
        assert {"training_commit", "training_steps", "data_seed"} <= facts.keys()


@shipped
def test_the_shipped_vae_reconstructs_held_out_clips():
    quality = reconstruction(load_vae(str(VAE_FILE)), 4, Sampling())
    assert quality.mean() >= 30


def embed_each_text_once(model: WanModel) -> None:
    """The text is the same at each step: what it becomes is kept, which changes no number and takes half the time."""
    model.text_keys = TextKeys(lambda: 2**32)
    embed, kept = model.text_embedding.forward, []

    def embed_or_find(context: torch.Tensor) -> torch.Tensor:
        if not (kept and torch.equal(kept[0], context)):
            kept[:] = context, embed(context)
        return kept[1]

    model.text_embedding.forward = embed_or_find


@shipped
@pytest.mark.timeout(900)
def test_the_shipped_model_does_what_held_out_prompts_say():
    cases, model = held_out_cases(10), WanModel.from_checkpoint(str(T2V_FILE))
    embed_each_text_once(model)
    latents = sample(model, cases, Sampling(), batch=5)
    verdicts = judge(cases, decode(load_vae(str(VAE_FILE)), latents, batch=2))
    assert sum(verdict.right for verdict in verdicts) >= math.ceil(0.9 * len(cases)), table(verdicts)
