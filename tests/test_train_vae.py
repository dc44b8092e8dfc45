"""Training a VAE: small objects count, losses fall, latents get unit variance."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from configs import common
from uva_jax.models import surgery
from uva_jax.models.policy_config import VAEConfig
from uva_jax.models.vae import VAE
from uva_jax.pretrain import vae as training
from uva_jax.runtime import parallel
from uva_jax.runtime.metrics import MetricsWriter, read_metrics
from uva_jax.runtime.sections import EMAOptions
from uva_jax.runtime.settings import section

pytestmark = pytest.mark.usefixtures("quick_compilation")
OPTIONS = dataclasses.replace(
    section(common.get_config().pretrain.vae_training, training.VAEOptions),
    steps=24,
    batch=8,
    lr=2e-3,
    warmup=2,
    ema=EMAOptions(max_value=0.9),
    checkpoint_every=12,
    log_every=4,
    frames=64,
    readout_weight=0.1,
    decode_every=1,
)
CONFIG = VAEConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_levels=(), z_channels=4)


@pytest.fixture(scope="module")
def scene():
    """Frames with a static background, a large moving object, and a dot of one pixel."""
    rng = np.random.default_rng(0)
    frames = np.broadcast_to(rng.integers(90, 110, (16, 16, 3), np.uint8), (64, 16, 16, 3)).copy()
    where = rng.integers(0, 12, (64, 2))
    dots = rng.integers(0, 16, (64, 2))
    for frame, (y, x), (v, u) in zip(frames, where, dots, strict=True):
        frame[y : y + 4, x : x + 4] = (200, 200, 210)
        frame[v, u] = (20, 30, 240)
    return frames, where.astype(np.float32) / 4 - 1.4, dots


def train(folder, scene, start=None, prepare=lambda batch, where: batch, **changes):
    folder.mkdir(exist_ok=True)
    with MetricsWriter(folder, "pretrain") as metrics:
        return training.train_vae(
            start or VAE(CONFIG, rngs=nnx.Rngs(0)),
            scene[0],
            scene[1],
            prepare=prepare,
            options=dataclasses.replace(OPTIONS, **changes),
            mesh=parallel.make_mesh(),
            seed=0,
            folder=folder / "states",
            metrics=metrics,
        )


@pytest.fixture(scope="module")
def trained(shared, scene):
    return train(shared / "vae", scene), read_metrics(shared / "vae", "pretrain")


def test_small_rare_things_weigh_more_than_large_ones_and_the_background(scene):
    frames, _, dots = scene
    scaled = frames.astype(np.float32) / 127.5 - 1
    weights = training.PixelWeights(scaled, 40.0)
    found = np.asarray(weights(scaled))
    assert found.mean() == pytest.approx(1.0, rel=1e-4)
    dot = np.median(found[np.arange(64), dots[:, 0], dots[:, 1]])
    thing = np.median(found[(frames[..., 0] == 200)])
    assert dot == pytest.approx(40 * found.min(), rel=1e-4)
    assert dot > 1.3 * thing > 4 * found.min()


def test_the_reconstruction_improves(trained):
    lines = trained[1]
    for name in ("vae/l1", "vae/edge", "vae/readout"):
        assert lines[-1][name] < 0.8 * lines[0][name], name


def test_latents_have_unit_variance_and_decode_to_the_same_frames(trained, scene):
    vae, frames = trained[0], scene[0][:32]
    mean, logvar = vae.encode(frames.astype(np.float32) / 127.5 - 1)
    latents = vae.sample(mean, logvar, jax.random.normal(jax.random.key(1), mean.shape))
    assert float(np.std(latents)) == pytest.approx(1.0, abs=0.05)
    arrays = surgery.flatten(vae)
    arrays["quant_conv/kernel"] = arrays["quant_conv/kernel"].at[..., :4].multiply(3.0)
    arrays["quant_conv/bias"] = arrays["quant_conv/bias"].at[:4].multiply(3.0)
    arrays["quant_conv/bias"] = arrays["quant_conv/bias"].at[4:].add(2 * np.log(3.0))
    arrays["post_quant_conv/kernel"] = arrays["post_quant_conv/kernel"] / 3.0
    off = surgery.replace(vae, arrays)
    back = training.scaled_to_unit(off, frames, jax.random.key(2))
    mean_again, logvar_again = back.encode(frames.astype(np.float32) / 127.5 - 1)
    ratio = float(np.std(mean_again) / np.std(mean))
    np.testing.assert_allclose(mean_again, mean * ratio, atol=1e-4)
    np.testing.assert_allclose(logvar_again, logvar + 2 * np.log(ratio), atol=1e-3)
    np.testing.assert_allclose(back.decode(latents * ratio), vae.decode(latents), atol=1e-3)


def test_a_finished_run_is_not_trained_again(shared, scene, trained):
    again = surgery.flatten(train(shared / "vae", scene))
    for path, x in surgery.flatten(trained[0]).items():
        np.testing.assert_array_equal(x, again[path])
    assert read_metrics(shared / "vae", "pretrain") == trained[1]


def test_a_pool_smaller_than_a_batch_is_an_error(tmp_path, scene):
    with pytest.raises(training.UserError, match="lower config.pretrain.vae_training.batch"):
        train(tmp_path, scene, batch=128)


def test_the_decoder_trains_on_by_itself(shared, scene, trained):
    vae, frames = trained[0], scene[0].astype(np.float32) / 127.5 - 1
    further = train(shared / "vae", scene, decoder_steps=24)
    before, after = surgery.flatten(vae), surgery.flatten(further)
    moved = {k.split("/")[0] for k in before if not np.array_equal(before[k], after[k])}
    assert moved == {"decoder", "post_quant_conv"}
    mean, _ = vae.encode(frames)
    errors = [np.mean(np.abs(x.decode(mean * 0.2325) - frames)) for x in (vae, further)]
    assert errors[1] < 0.95 * errors[0]


def test_a_given_vae_can_have_its_decoder_alone_trained(tmp_path, shared, scene, trained):
    both = surgery.flatten(train(shared / "vae", scene, decoder_steps=24))
    alone = train(tmp_path / "alone", scene, trained[0], steps=0, decoder_steps=24)
    for path, x in surgery.flatten(alone).items():
        np.testing.assert_array_equal(x, both[path])


def test_a_frame_is_rare_by_what_it_shows_where():
    frames = np.full((8, 4, 4, 3), 250, np.uint8)
    frames[:6, 0, 0] = frames[6, 3, 3] = 0  # six equal dots, then one elsewhere, and none
    found = training.rarity(frames)
    pixels = np.full((8, 16), -np.log(1))
    pixels[:6, 0], pixels[6:, 0] = -np.log(6 / 8), -np.log(2 / 8)
    pixels[:, 15] = -np.log(7 / 8)
    pixels[6, 15] = -np.log(1 / 8)
    np.testing.assert_allclose(found, pixels.mean(axis=1), rtol=1e-12)


@pytest.mark.parametrize("steps, name", [("steps", "rarity"), ("decoder_steps", "decoder_rarity")])
def test_rare_frames_are_drawn_more_often(tmp_path, scene, trained, steps, name):
    frames = scene[0].copy()
    frames[8:] = frames[8]  # eight frames are rare among copies of a ninth

    def rare_share(power):
        seen = []

        def prepare(batch, where):
            seen.append((batch["image"] != frames[8]).any(axis=(1, 2, 3)))
            return batch

        folder = tmp_path / str(power)
        given = (frames, None, None)
        options = {"steps": 0, "decoder_steps": 0} | {steps: 8, name: power}
        train(folder, given, trained[0], prepare, **options)
        return np.mean(seen)

    assert rare_share(0.0) < 0.25 < 0.75 < rare_share(2.0)
