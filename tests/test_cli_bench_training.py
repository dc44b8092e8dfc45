"""`bench training`: every row runs real steps, and the torch step trains like this project's."""

import jax
import numpy as np
import pytest

from uva_jax.cli import bench_training
from uva_jax.cli.bench_training import Row

pytestmark = pytest.mark.usefixtures("quick_compilation")
torch = pytest.importorskip("torch")
training_step = pytest.importorskip("convert.torch.training_step")


@pytest.mark.parametrize("source", ["frames", "latents"])
def test_a_torch_step_moves_the_policy(source):
    config = bench_training.architecture("tiny")
    batch = bench_training._batch(config, Row("torch", source, "float32"), 2)
    step, policy = training_step.make_step(config, batch, "float32")
    step()
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    step()
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("model.encoder_blocks") for n in changed)
    assert not any(n.startswith("vae_model") for n in changed)
    grads = {n for n, p in policy.named_parameters() if p.grad is not None}
    assert any(n.startswith("model.encoder_blocks") for n in grads)
    assert any(n.startswith("model.diffactloss") for n in grads)
    assert not any(n.startswith("vae_model") for n in grads)


def test_our_step_from_latents_has_a_finite_loss():
    config = bench_training.architecture("tiny")
    step = bench_training._jax_step(config, Row("uva_jax", "latents", "float32", 2), 2)
    _, scalars = step()
    assert np.isfinite(jax.device_get(scalars["loss"]))


def test_the_table_has_a_line_for_every_row():
    rows = [row._asdict() | {"seconds": 0.5} for row in bench_training.ROWS]
    text = bench_training.table({"size": "tiny", "batch": 16, "rows": rows})
    lines = text.splitlines()
    assert len(lines) == 2 + len(bench_training.ROWS)
    assert lines[2].split() == ["torch", "frames", "float32", "1", "0.500", "2.00", "32"]
