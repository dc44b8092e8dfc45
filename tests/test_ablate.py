"""`ablate`: the variants, one real measurement, and errors."""

import numpy as np
import pytest
from flax import nnx

from uva_jax.cli import ablate
from uva_jax.models import policy_folder
from uva_jax.models.policy import Policy
from uva_jax.pretrain import architecture, joint
from uva_jax.runtime.settings import section

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(make_config):
    config = make_config(data__mirror="pusht")
    p = config.pretrain
    p.model.update(image_size=16, vae_width=32, vae_multipliers=(1, 1, 1), width=32, depth=1)
    p.model.update(heads=2, dropout=0.0, video_head=(32, 1), action_head=(32, 1))
    p.update(batch=8, warmup=1, readout="state", readout_angles=(4,), judge_windows=8)
    p.update(steps_per_call=1, modes={"policy_model": 1.0})
    return config


def test_every_part_of_the_recipe_is_taken_away_once(config):
    options = section(config.pretrain, joint.PretrainOptions)
    base, *others = ablate.variants(options, mirror=True, readout=True)
    assert base == ablate.Variant("as configured")
    for variant in others:
        changed = [f for f in variant._fields[1:] if getattr(variant, f) != getattr(base, f)]
        assert len(changed) == 1, variant
    assert len({v.name for v in others}) == len(others) == 6
    fewer = ablate.variants(options, mirror=False, readout=False)
    assert not any(v.mirror or v.readout for v in fewer)


def test_a_row_is_trained_judged_and_kept(config, tmp_path, capsys, monkeypatch):
    model = section(config.pretrain.model, architecture.ModelOptions)
    policy = Policy(architecture.model_config(model, 2), rngs=nnx.Rngs(0))
    policy_folder.save_policy(tmp_path / "policy", policy, source={})
    first = ablate.variants
    monkeypatch.setattr(ablate, "variants", lambda *a, **k: first(*a, **k)[:2])
    monkeypatch.setattr(ablate, "_JUDGED", 16)
    for _ in range(2):
        ablate.run(config, tmp_path / "runs", str(tmp_path / "policy"), 8)
    once, again = capsys.readouterr().out.split("episodes, 8 steps of 8 windows")[1:]
    names = [line[:30].strip() for line in once.splitlines()[2:5]]
    assert names == ["as configured", "one noise draw", "frames encoded in every step"]
    rows = [line[30:].split() for line in once.splitlines()[2:4]]
    assert again.splitlines()[2][:38] == once.splitlines()[2][:38]  # read, not measured again
    assert all(np.isfinite(float(x)) and float(x) > 0 for row in rows for x in row)
    with pytest.raises(ablate.UserError, match="other settings"):
        ablate.run(config, tmp_path / "runs", str(tmp_path / "policy"), 9)


def test_a_policy_of_more_than_images_is_refused(config, tmp_path):
    told = config.copy_and_resolve_references()
    told.pretrain.model.text_dim = 12
    with pytest.raises(ablate.UserError, match="one camera and nothing else"):
        ablate.run(told, tmp_path / "runs", "embedded", 8)


def test_what_is_missing_is_said(capsys):
    assert ablate.main(["--config", "configs/pretrain_tiny.py"]) == 2
    assert "--workdir" in capsys.readouterr().err
