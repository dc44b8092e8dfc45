"""CLIP's text transformer: parity with transformers, conversion both ways, `verify`."""

import dataclasses
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import silently
from flax import nnx
from variants import VARIANTS

from convert import from_torch, infer, rules, to_torch
from convert.checks.verify import verify_checkpoint
from convert.describe import describe
from convert.formats import torch_file
from uva_jax.models import surgery
from uva_jax.models.policy_config import TextTowerConfig
from uva_jax.models.text_tower import TextTower, attention_mask
from uva_jax.runtime.errors import UserError

TEACHER = Path(__file__).parent.parent / "uva_jax" / "assets" / "uva_pusht_tiny.ckpt"
# Recorded from transformers' CLIPModel with random weights: every layer, two masks.
GOLDEN = np.load(Path(__file__).parent / "goldens" / "text_tower.npz")
TINY = TextTowerConfig(
    vocab_size=48, width=32, depth=2, num_heads=2, max_length=16, projection=24, mlp_width=80
)
CONFIG = dataclasses.replace(
    VARIANTS["libero10"],
    video_head=None,
    action_head=dataclasses.replace(VARIANTS["libero10"].action_head, sampling_steps="4"),
    text_tower=TextTowerConfig(
        vocab_size=48, width=128, depth=2, num_heads=2, max_length=16, projection=12, mlp_width=64
    ),
)


def random_policy(config):
    """Returns a policy with numpy's random numbers, which need no compilation."""
    policy, rng = surgery.abstract_policy(config), np.random.default_rng(0)
    arrays = {
        path: jnp.asarray(rng.normal(path.endswith("/scale"), 0.1, leaf.shape).astype(np.float32))
        for path, leaf in surgery.shapes(policy).items()
    }
    return surgery.replace(policy, arrays)


@pytest.fixture(scope="module")
def tower():
    """The recorded weights, through the rule table."""
    arrays = {}
    for name in GOLDEN.files:
        if name.startswith("weights/"):
            path, layout = rules.to_flax(name.removeprefix("weights/"))
            values = layout.forward(GOLDEN[name].astype(np.float32))
            arrays[path.removeprefix("text_model/")] = jnp.asarray(values)
    return surgery.replace(nnx.eval_shape(lambda: TextTower(TINY, rngs=nnx.Rngs(0))), arrays)


run = jax.jit(lambda tower, tokens, mask: tower(tokens, mask))


def relative(got, want):
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("mask", ["plain", "holes"])
def test_every_layer_equals_the_originals(tower, mask):
    tokens, seen = GOLDEN["tokens"], attention_mask(GOLDEN[f"{mask}/mask"])
    with jax.default_matmul_precision("highest"):
        x = tower.embed(tokens)
        assert relative(x, GOLDEN[f"{mask}/hidden0"]) <= 1e-5
        for i, layer in enumerate(tower.layers):
            x = layer(x, seen)
            assert relative(x, GOLDEN[f"{mask}/hidden{i + 1}"]) <= 1e-5, i
        got = run(tower, tokens, GOLDEN[f"{mask}/mask"])
    assert relative(got, GOLDEN[f"{mask}/text_embeds"]) <= 1e-5


def test_what_follows_the_end_token_does_not_matter(tower):
    tokens, mask = (np.array(GOLDEN[n]) for n in ("tokens", "plain/mask"))
    lengths = mask.sum(axis=1)
    short = int(lengths.argmin())
    cut = slice(short, short + 1)
    other = np.where(np.arange(tokens.shape[1]) < lengths[short], tokens, tokens % 7)
    want = run(tower, tokens, mask)[cut]
    for changed in ((tokens, np.ones_like(mask)), (other, mask), (other, np.ones_like(mask))):
        np.testing.assert_allclose(run(tower, *changed)[cut], want, rtol=1e-5, atol=1e-6)


def test_a_token_sees_itself_and_those_before_but_no_padding():
    seen = np.asarray(attention_mask(jnp.array([[1, 0, 1]])))[0, 0]
    assert seen.tolist() == [[True, False, False], [True, False, False], [True, False, True]]


def test_a_sentence_of_padding_gives_numbers(tower):
    assert np.isfinite(run(tower, GOLDEN["tokens"], np.zeros_like(GOLDEN["plain/mask"]))).all()


def test_the_torch_reference_equals_the_original_too():
    torch = pytest.importorskip("torch")
    from convert.torch.reference_text import TextTower as TorchTower

    reference = TorchTower(TINY)
    weights = {
        name.removeprefix("weights/text_model."): torch.from_numpy(GOLDEN[name].astype(np.float32))
        for name in GOLDEN.files
        if name.startswith("weights/")
    }
    reference.load_state_dict(weights, strict=True)
    tokens, mask = (torch.from_numpy(GOLDEN[n]).long() for n in ("tokens", "holes/mask"))
    with torch.no_grad():
        got = reference.stages(tokens, mask)
    assert relative(got["layer1"].numpy(), GOLDEN["holes/hidden2"]) <= 1e-5
    assert relative(got["text_embeds"].numpy(), GOLDEN["holes/text_embeds"]) <= 1e-5


# ---- conversion ----


VISION = {
    "text_model.logit_scale": np.float32(4.6),
    "text_model.visual_projection.weight": np.ones((12, 8), np.float32),
    "text_model.vision_model.embeddings.class_embedding": np.ones(8, np.float32),
    "text_model.vision_model.encoder.layers.0.mlp.fc1.weight": np.ones((8, 8), np.float32),
    "text_model.vision_model.embeddings.position_ids": np.arange(5)[None],
    "text_model.text_model.embeddings.position_ids": np.arange(16)[None],
}


@pytest.fixture(scope="module")
def policy():
    return random_policy(CONFIG)


@pytest.fixture(scope="module")
def libero(policy, tmp_path_factory):
    """A checkpoint as UVA's training writes it, with all of CLIP."""
    path = tmp_path_factory.mktemp("libero") / "libero10.ckpt"
    to_torch.export_policy(policy, path)
    written = torch_file.read(path)
    state = OrderedDict((k, v.numpy()) for k, v in written.state_dict("ema_model").items())
    state |= {name: np.asarray(value) for name, value in VISION.items()}
    payload = {k: v for k, v in written.payload.items() if k != "uva_jax"}
    torch_file.write(path, payload | {"state_dicts": {"ema_model": state}})
    return path


def test_the_tower_is_inferred_and_the_vision_half_left_out(libero, policy):
    again, info = from_torch.convert_checkpoint(libero)
    assert again.config == CONFIG
    found, wanted = surgery.flatten(again), surgery.flatten(policy)
    assert sum(path.startswith("text_model/") for path in wanted) == 37
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)
    assert set(info["ignored"]) - {"_dummy_variable"} == set(VISION)
    assert info["ignored"]["text_model.logit_scale"] == (
        "CLIP's vision tower, which UVA does not use"
    )
    parts = describe(libero)["parts"]
    assert any("language tower" in str(part) for part in parts)


def test_all_of_clip_comes_back_to_the_bit_with_the_base(libero, tmp_path):
    from_torch.from_torch(libero, tmp_path / "policy")
    with pytest.raises(UserError, match="CLIP's vision tower.* --base"):
        to_torch.export_policy(tmp_path / "policy", tmp_path / "out.ckpt")
    to_torch.export_policy(tmp_path / "policy", tmp_path / "out.ckpt", base=libero)
    back, source = (
        torch_file.read(p).state_dict("ema_model") for p in (tmp_path / "out.ckpt", libero)
    )
    assert list(back) == list(source)
    for name, tensor in source.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert back[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def test_a_checkpoint_without_a_tower_has_none():
    checkpoint = torch_file.read(TEACHER)
    tensors = from_torch.state_tensors(checkpoint, "ema")
    assert from_torch.infer_policy(checkpoint, tensors).text_tower is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_model.text_projection.weight": None}, "no tensor 'text_model.text_projection"),
        (
            {"text_model.text_model.embeddings.token_embedding.weight": (48, 130)},
            "width 130, which is not a multiple of 64",
        ),
    ],
)
def test_half_a_tower_or_another_one_is_refused(libero, change, message):
    checkpoint = torch_file.read(libero)
    shapes = {k: t.shape for k, t in from_torch.state_tensors(checkpoint, "ema").items()} | change
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    with pytest.raises(UserError, match=message):
        infer.infer_config(shapes, checkpoint.cfg, "libero10.ckpt")


def test_verify_compares_the_tower_layer_by_layer(libero):
    pytest.importorskip("torch")
    checks, printed = silently(verify_checkpoint, libero)
    parts = [check for check in checks if check.name.startswith("text_model.")]
    wanted = ["embed", "layer0", "layer1", "text_embeds"]
    assert [check.name.removeprefix("text_model.") for check in parts] == wanted
    assert all(check.ok for check in checks), printed
