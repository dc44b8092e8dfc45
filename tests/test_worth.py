"""`worth`: the configurations of its cells, one small table, resuming, and errors."""

import json
import shutil

import numpy as np
import pytest
from conftest import silently

from uva_jax.cli import worth as command
from uva_jax.eval.evaluate import rollout_seeds
from uva_jax.graft import record
from uva_jax.models import policy_folder, surgery
from uva_jax.pipeline.engine import Context
from uva_jax.pipeline.stages import stages
from uva_jax.pipeline.worth import RECIPES, Cell, cell_config, cell_stages
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections import EvaluateOptions
from uva_jax.runtime.settings import check, leaves, section
from uva_jax.storage.sample_store import SampleStore

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(make_config):
    config = make_config()
    config.finetune.freeze = ("mar", "action_head/memory/aggregator")
    return config


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_only_how_stage_2_trains(config, recipe):
    found = check(cell_config(config, Cell("graft", recipe, 0.2)))
    before = leaves(check(config))
    changed = {k for k, v in leaves(found).items() if before.get(k) != v}
    assert (
        changed - {"finetune.data_fraction"}
        == {
            "configured": set(),
            "free": set(),  # this configuration has no teacher's term
            "held": {"finetune.teacher_weight"},
            "weighted": set(),  # it has the weights by default
            "unweighted": {"finetune.x0_weight"},
            "lora": {"finetune.use_lora", "finetune.reuse_cache"},
            "unfreeze": {"finetune.unfreeze_at", "finetune.reuse_cache"},
        }[recipe]
    )
    assert config.finetune.data_fraction == before["finetune.data_fraction"]


def test_the_teachers_own_head_is_tuned_by_the_same_stages_without_a_graft(config):
    found = check(cell_config(config, Cell("teacher", "configured", 1.0)))
    assert found.finetune.freeze == ("mar", "action_head/aggregator")
    assert not {"distill", "assemble", "shorten"} & {s.name for s in stages(found)}
    with pytest.raises(UserError, match="shorten.evaluations.*head.replace=False"):
        wrong = config.copy_and_resolve_references()
        wrong.shorten.evaluations, wrong.head.replace = 1, False
        check(wrong)


def test_processes_capture_tokens_together(finished, config, tmp_path, monkeypatch):
    cell, given, calls = Cell("graft", "configured", 0.5), {}, []
    tuned = check(cell_config(config, cell))
    (stage,) = (s for s in cell_stages(check(config), tuned, cell) if s.name == "tokens")
    monkeypatch.setattr(record, "capture_activations", lambda *args, **how: given.update(how))
    with MetricsWriter(tmp_path, "tokens") as metrics:
        inputs = {"convert": finished.workdir / "teacher"}
        stage.run(Context(tuned, tmp_path, tmp_path, metrics, inputs, False, calls.append))
    given["barrier"]("written")
    assert not given["is_primary"] and calls == ["written"]
    assert given["episodes"].sum() == 1


def test_recipes_that_train_the_trunk_share_one_store_of_latents(finished, config, tmp_path):
    found = {}
    for recipe in ("configured", "lora", "unfreeze"):
        cell = Cell("graft", recipe, 0.5)
        tuned = check(cell_config(config, cell))
        by_name = {s.name: s for s in cell_stages(check(config), tuned, cell)}
        found[recipe] = by_name.get("latents")
        assert ("latents" in by_name[cell.name].needs) == (recipe != "configured")
    assert found["configured"] is None
    assert found["lora"].folder == found["unfreeze"].folder == "latents/0.5"
    with MetricsWriter(tmp_path, "latents") as metrics:
        inputs = {"convert": finished.workdir / "teacher"}
        context = Context(tuned, tmp_path, tmp_path, metrics, inputs, True, lambda name: None)
        facts = found["lora"].run(context)
    store = SampleStore.open(tmp_path / "store")
    assert set(store.names) == {"image_moments", "action"}
    # All windows of one of the two training episodes.
    assert facts["samples"] == store.num_samples > 100


def test_the_table_ranks_all_rolls_out_the_best_and_resumes(finished, config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir, symlinks=True)
    cells = [Cell("teacher", "configured", 1.0), Cell("random", "held", 0.5)]
    rows, printed = silently(command.run, config, workdir, cells, 1)
    assert "convert: skipped" in printed and "distill: skipped" in printed
    names = ["teacher", "stage1", "teacher-configured-1", "random-held-0.5"]
    assert [row["name"] for row in rows[:2]] == names[:2]
    assert {row["name"] for row in rows} == set(names)
    first, last = rows[2:]
    assert first["error"] <= last["error"]
    assert [("scores" in row) for row in rows] == [True, True, True, False]
    assert rows[0]["error"] != rows[1]["error"] and len(rows[0]["errors"]) == 6
    difference = np.mean(np.subtract(first["scores"], rows[0]["scores"]))
    assert first["score_to_teacher"]["mean"] == pytest.approx(difference)
    # The teacher's head is tuned as it is; everything before it stays.
    arrays = [
        surgery.flatten(policy_folder.load_policy(folder / "policy"))
        for folder in (workdir / "teacher", workdir / "worth/policies/teacher-configured-1")
    ]
    assert arrays[0].keys() == arrays[1].keys()
    moved = {k for k, x in arrays[0].items() if not np.array_equal(x, arrays[1][k])}
    assert all(k.startswith("action_head/net/") for k in moved)
    assert json.loads((workdir / "worth/table.json").read_text()) == rows
    again, printed = silently(command.run, config, workdir, cells, 1)
    assert again == rows and "starting" not in printed
    table = (workdir / "worth/table.md").read_text()
    assert table in printed and table.count("\n| ") == 4


@pytest.mark.parametrize(
    "given, said",
    [
        (["--fractions=0.1,2"], "'2'; shares of the data are above 0"),
        (["--heads=mlp"], "--heads names 'mlp'; it can be teacher, graft, random"),
        (["--recipes=muon"], "--recipes names 'muon'"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(given, said, tmp_path, capsys):
    where = ["--config", "configs/pusht_tiny.py", "--workdir", str(tmp_path / "run")]
    assert command.main([*where, *given]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("given", "count"), [(0, 0), (3, 3)])
def test_no_seeds_mean_no_rollouts(given, count, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "run", lambda config, *rest: seen.append(check(config)))
    where = ["--config", "configs/pusht_tiny.py", "--workdir", "run"]
    assert command.main([*where, f"--num_seeds={given}"]) == 0
    assert len(rollout_seeds(section(seen[0].evaluate, EvaluateOptions))) == count


def test_a_configuration_without_a_graft_is_refused(make_config, tmp_path):
    config = make_config(head__replace=False, shorten__evaluations=0)
    with pytest.raises(UserError, match="there is no graft"):
        command.run(config, tmp_path / "run", [], 1)
    assert not (tmp_path / "run").exists()
