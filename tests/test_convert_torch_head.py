"""The torch modules: the grafted head, the reference policy, and `verify` on both."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

from convert import from_torch, to_torch  # noqa: E402
from convert.__main__ import main  # noqa: E402
from convert.checks.verify import verify_checkpoint  # noqa: E402
from convert.torch.head import GraftedActionHead  # noqa: E402
from convert.torch.operators import OPERATORS  # noqa: E402
from uva_jax.models import policy_folder, surgery  # noqa: E402
from uva_jax.models.grafted_head import GraftedHead  # noqa: E402
from uva_jax.models.policy_config import GraftedHeadConfig  # noqa: E402

MODES = ("policy_model", "full_dynamic_model")
TEACHER = Path(__file__).parent.parent / "uva_jax" / "assets" / "uva_pusht_tiny.ckpt"


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def make_head(**options):
    """Returns a grafted head whose gates are not zero."""
    config = GraftedHeadConfig(
        channels=2,
        z_channels=24,
        width=32,
        depth=2,
        grid=(4, 4),
        pool=(2, 2),
        num_heads=4,
        self_attn_heads=4,
        memory_width=20,
        **{"sampling_steps": "4"} | options,
    )
    head = nnx.eval_shape(lambda: GraftedHead(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(1)
    return surgery.replace(
        head,
        {
            path: jnp.asarray(0.1 * random.standard_normal(leaf.shape), leaf.dtype)
            for path, leaf in surgery.shapes(head).items()
        },
    )


def make_twin(head):
    from convert import rules

    twin = GraftedActionHead(dataclasses.asdict(head.config))
    state = {}
    for path, value in surgery.flatten(head).items():
        name, layout = rules.to_torch(f"action_head/{path}")
        array = np.ascontiguousarray(layout.inverse(np.asarray(value)))
        state[name.removeprefix("model.diffactloss.")] = torch.from_numpy(array.copy())
    twin.load_state_dict(state, strict=True)
    return twin


def assert_close(got, want, relative=1e-5):
    want = want.detach().numpy()
    assert np.shape(got) == want.shape
    assert np.abs(np.asarray(got) - want).max() <= relative * np.abs(want).max()


MIXED = (("pooled_cross_attn", "windowed_self_attn", "swiglu"), ("none", "none", "keep"))
SMALL = (("cross_attn", "none", "mlp"), ("cross_attn", "light_self_attn", "mlp"))
FORMS = (
    ("condition", "video+aggregate", "conv", ()),
    ("condition", "video+aggregate", "conv", MIXED),
    ("condition", "video+aggregate", "conv", SMALL),
    ("condition", "video", "linear", ()),
    ("residual", "video", "conv", ()),
    ("residual", "video+aggregate", "linear", MIXED[:1] * 2),
)


@pytest.mark.parametrize(("cross_attention", "memory", "adapter", "operators"), FORMS)
def test_the_twin_equals_flax(cross_attention, memory, adapter, operators):
    head = make_head(
        cross_attention=cross_attention, memory=memory, adapter=adapter, operators=operators
    )
    twin, random = make_twin(head), np.random.default_rng(0)
    z = random.standard_normal((4, 64, 24), dtype=np.float32)
    noise = random.standard_normal((5, 4, 16, 2), dtype=np.float32)
    t = np.array([0, 3, 500, 999])
    target = random.uniform(-1, 1, (4, 16, 2)).astype(np.float32)

    @jax.jit
    def outputs(head, z, noise, t, target):
        return {
            "condition": head.condition(z),
            "loss": head.loss(target, z, t=t, noise=noise[0])["loss"].mean(),
            "sample": head.sample(z, noise=noise, temperature=0.9),
            "guided": head.sample(z, noise=noise[:, :2], cfg=1.5, guided=True),
        }

    got = outputs(head, z, noise, t, target)
    z, noise, t, target = map(torch.from_numpy, (z, noise, t, target))
    assert_close(got["condition"], twin.condition(z))
    assert_close(got["loss"], twin(target, z, t=t, noise=noise[0]))
    rows = noise.reshape(5, 64, 2)
    assert_close(got["sample"], twin.sample(z, 0.9, noise=rows))
    assert_close(got["guided"], twin.sample(z, cfg=1.5, noise=noise[:, :2]))


@pytest.mark.parametrize("evaluations", ["1", "3"])
def test_the_twin_of_a_shortened_head_equals_flax(evaluations):
    head = make_head(prediction="x0_from_eps", sampling_steps=evaluations)
    twin, random = make_twin(head), np.random.default_rng(0)
    z = random.standard_normal((4, 64, 24), dtype=np.float32)
    noise = random.standard_normal((int(evaluations) + 1, 4, 16, 2), dtype=np.float32)
    target = random.uniform(-1, 1, (4, 16, 2)).astype(np.float32)
    t = np.array([999, 3, 500, 999])

    @jax.jit
    def outputs(head, z, noise, t, target):
        return {
            "loss": head.loss(target, z, t=t, noise=noise[0])["loss"].mean(),
            "sample": head.sample(z, noise=noise, temperature=0.9),
            "guided": head.sample(z, noise=noise[:, :2], cfg=1.5, guided=True),
        }

    got = outputs(head, z, noise, t, target)
    z, noise, t, target = map(torch.from_numpy, (z, noise, t, target))
    assert_close(got["loss"], twin(target, z, t=t, noise=noise[0]))
    assert_close(got["sample"], twin.sample(z, 0.9, noise=noise))
    assert_close(got["guided"], twin.sample(z, cfg=1.5, noise=noise[:, :2]))


def test_the_twin_refuses_a_prediction_that_it_cannot_sample():
    config = dataclasses.asdict(make_head().config) | {"prediction": "x0"}
    with pytest.raises(ValueError, match="predicts 'x0'"):
        GraftedActionHead(config)


def test_the_twin_has_the_originals_interface_and_trains():
    twin = GraftedActionHead(dataclasses.asdict(make_head().config))
    z = torch.randn(2, 64, 24)
    loss = twin(torch.zeros(2, 16, 2), z, task_mode="policy_model", text_latents=None)
    loss.backward()
    assert loss.shape == () and twin.final_layer.linear.weight.grad.abs().sum() > 0
    actions = twin.sample(z, 1.0, 1.0, text_latents=None)
    assert actions.shape == (2, 16, 2) and actions.abs().max() <= 1


@pytest.fixture(scope="module")
def grafted(tmp_path_factory):
    """An export of the teacher with a grafted head, and the policy it came from."""
    folder = tmp_path_factory.mktemp("graft")
    from_torch.from_torch(TEACHER, folder / "teacher")
    teacher = policy_folder.load_policy(folder / "teacher")
    head = teacher.config.action_head
    config = GraftedHeadConfig(
        channels=head.channels,
        z_channels=head.z_channels,
        width=head.width,
        depth=2,
        operators=MIXED,
        grid=head.grid,
        sampling_steps="5",
    )
    config = dataclasses.replace(teacher.config, action_head=config)
    grafted, random = surgery.abstract_policy(config), np.random.default_rng(2)
    arrays = surgery.flatten(teacher)
    for path, leaf in surgery.shapes(grafted).items():
        if path.startswith("action_head/"):
            arrays[path] = jnp.asarray(0.05 * random.standard_normal(leaf.shape), leaf.dtype)
    arrays = {path: arrays[path] for path in surgery.shapes(grafted)}
    grafted = surgery.replace(grafted, arrays)
    records = policy_folder.read_records(folder / "teacher")
    to_torch.export_policy(grafted, folder / "grafted.ckpt", records=records)
    return folder / "grafted.ckpt", grafted


def test_a_grafted_export_loads_into_the_twin(grafted):
    path, policy = grafted
    twin = GraftedActionHead.from_checkpoint(path)
    z = np.random.default_rng(0).standard_normal((1, 64, 128), dtype=np.float32)
    assert_close(policy.action_head.condition(z), twin.condition(torch.from_numpy(z)))


def test_a_grafted_export_reads_back_as_the_same_policy(grafted):
    path, policy = grafted
    again, _ = from_torch.convert_checkpoint(path)
    assert again.config == policy.config
    found, wanted = surgery.flatten(again), surgery.flatten(policy)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_all_but_the_grafted_head_is_the_sources_to_the_bit(grafted):
    source, export = (
        torch.load(path, weights_only=False)["state_dicts"]["ema_model"]
        for path in (TEACHER, grafted[0])
    )
    kept = [name for name in source if not name.startswith("model.diffactloss.")]
    assert [n for n in export if not n.startswith("model.diffactloss.")] == kept
    for name in kept:
        assert source[name].dtype == export[name].dtype
        assert torch.equal(source[name], export[name])


def test_an_operator_without_a_torch_class_is_named(monkeypatch):
    config = dataclasses.asdict(make_head().config)
    own = ("cross_attn", "my_package.operators:Shift", "mlp")
    with pytest.raises(ValueError, match=r"Set OPERATORS\['self_attn'\]\['my_package"):
        GraftedActionHead(config | {"operators": [own, own]})
    monkeypatch.setitem(OPERATORS["self_attn"], own[1], lambda config: torch.nn.Identity())
    assert GraftedActionHead(config | {"operators": [own, own]})


def test_a_checkpoint_without_a_graft_is_refused_by_the_twin():
    with pytest.raises(ValueError, match="holds no grafted action head"):
        GraftedActionHead.from_checkpoint(TEACHER)


def test_verify_finds_torch_and_flax_equal_on_a_graft(grafted, capsys):
    assert main(["verify", str(grafted[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "0 failed" in lines[-1]
    assert any(line.startswith("action_head.sample") for line in lines)


def test_verify_names_the_parts_that_differ(monkeypatch):
    from uva_jax.models import layers

    monkeypatch.setattr(layers, "gelu", jax.nn.gelu)  # the tanh form
    jax.clear_caches()
    checks = verify_checkpoint(TEACHER, show=lambda line: None)
    jax.clear_caches()
    failed = {check.name for check in checks if not check.ok}
    blocks = {check.name for check in checks if "_block" in check.name and "_model." in check.name}
    assert "policy_model.encoder_block0" in failed
    # The input of each part is torch's result of the part before, so errors do not add up.
    outputs = {f"{m}.{s}_out" for m in MODES for s in ("encoder", "decoder")}
    assert failed <= blocks | outputs


def test_verify_without_torch_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("convert.checks.verify.torch", None)
    assert main(["verify", str(TEACHER)]) == 2
    assert "pip install 'uva_jax[torch]'" in capsys.readouterr().err
