"""The main command, from checkpoint to report, and its errors for bad input."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import CONFIG, HEAD, REPO, make_policy, silently

from convert.from_torch import convert_checkpoint
from convert.to_torch import export_policy
from uva_jax.cli import steps
from uva_jax.data.replay_writer import ReplayBufferWriter
from uva_jax.eval import evaluate
from uva_jax.main import _with_config, run
from uva_jax.models import policy_folder, surgery
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.guards import locked
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections import EvaluateOptions
from uva_jax.storage.atomic import is_leftover

STAGES = ("convert", "capture", "distill", "assemble", "finetune", "shorten", "evaluate", "export")
FOLDERS = (
    *("teacher", "activations", "operators", "grafted", "finetune", "shortened", "eval", "export"),
)


def copy(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished.workdir, tmp_path / "run")


def outcome(printed: str) -> dict[str, str]:
    """Returns "skipped" or "ran" for every stage, from the run's output."""
    return {
        name: "skipped" if f"{name}: skipped" in printed else "ran"
        for name in STAGES
        if f"{name}: skipped" in printed or f"{name}: finished" in printed
    }


# ---- the whole pipeline ----


def test_a_run_leaves_the_layout_of_the_readme(finished):
    wanted = [
        "config.json", "metrics.jsonl", "teacher/policy/policy.json", "teacher/policy/params",
        "activations/train/index.json", "activations/held_out/index.json", "operators/head.json",
        "grafted/policy/policy.json", "finetune/policy/policy.json", "eval/metrics.json",
        "eval/report.html", "eval/videos", "export/grafted.ckpt", "export/grafted_head.py",
        "shortened/policy/policy.json", "export/grafted_shortened.ckpt",
        "tensorboard/distill", "tensorboard/finetune",
    ]  # fmt: skip
    for family in ("cross_attn", "self_attn", "mlp"):
        wanted += [f"operators/{family}/{name}" for name in ("params", "operator.json")]
        wanted += [f"operators/{family}/metrics.json"]
    wanted += [f"{folder}/done.json" for folder in FOLDERS]
    assert [name for name in wanted if not (finished.workdir / name).exists()] == []
    assert list((finished.workdir / "eval" / "videos").glob("*.mp4"))
    assert not any(map(is_leftover, finished.workdir.rglob("*")))


def test_the_evaluation_compares_the_policies_on_the_same_seeds(finished):
    metrics = json.loads((finished.workdir / "eval" / "metrics.json").read_text())
    for name in ("teacher", "graft_stage1", "graft", "graft_shortened"):
        assert len(metrics[name]["scores"]) == 2
        assert metrics[name]["seeds"] == [100_000, 100_001]
        assert metrics[name]["test_mean_score"] == pytest.approx(np.mean(metrics[name]["scores"]))
    paired = metrics["paired_difference"]
    scores = [np.mean(metrics[name]["scores"]) for name in ("graft", "teacher")]
    assert paired["mean"] == pytest.approx(scores[0] - scores[1])
    assert paired["ci95"][0] <= paired["mean"] <= paired["ci95"][1]
    found = metrics["verdict"]
    assert found["kind"] == "undecided" and found["difference"] == pytest.approx(paired["mean"])
    assert found["sentence"].startswith("2 seeds do not tell whether the graft is worse than")
    assert metrics["verdict_shortened"]["seeds"] == 2
    assert f"evaluate: {found['sentence']}" in finished.printed
    assert "--seeds 100000:1" in finished.printed and "--until-decided" in finished.printed


def test_a_policy_that_equals_an_earlier_one_is_not_evaluated_again(finished, tmp_path, capsys):
    teacher, stage1, again = (
        policy_folder.load_policy(finished.workdir / folder / "policy")
        for folder in ("teacher", "grafted", "grafted")
    )
    options = EvaluateOptions(num_seeds=2, max_steps=8, sampling_steps="4", videos=1, workers=1)
    policies = {"teacher": teacher, "graft_stage1": stage1, "graft": again}
    with MetricsWriter(tmp_path, "evaluate") as metrics:
        found = evaluate.evaluate(policies, None, options, tmp_path, metrics)
    assert "graft is the same policy as graft_stage1" in capsys.readouterr().out
    assert found["graft"] == found["graft_stage1"] != found["teacher"]
    assert found["paired_difference"] == found["paired_difference_stage1"]
    assert {path.name for path in tmp_path.glob("*.json")} == {
        *("teacher.json", "graft_stage1.json", "metrics.json"),
    }
    assert list((tmp_path / "videos").glob("*.mp4"))


def test_the_export_is_the_fine_tuned_policy(finished):
    exported, _ = convert_checkpoint(finished.workdir / "export" / "grafted.ckpt")
    tuned = policy_folder.load_policy(finished.workdir / "finetune" / "policy")
    assert exported.config == tuned.config
    got, want = surgery.flatten(exported), surgery.flatten(tuned)
    assert all(np.array_equal(got[path], want[path]) for path in want)


def test_the_second_run_skips_everything(finished, make_config, tmp_path):
    metrics, printed = silently(run, make_config(), str(copy(finished, tmp_path)), None)
    assert outcome(printed) == dict.fromkeys(STAGES, "skipped")
    assert metrics == finished.metrics


@pytest.mark.parametrize(
    "change, reruns",
    [
        ({"export__filename": "other.ckpt"}, {"export"}),
        ({"evaluate__noise_seed": 1}, {"evaluate"}),
        ({"evaluate__sampling_steps": "3"}, {"evaluate"}),
        ({"shorten__lr": 2e-4}, {"shorten", "evaluate", "export"}),
        ({"finetune__lr": 2e-4}, {"finetune", "shorten", "evaluate", "export"}),
        ({"distill__lr": 2e-3}, set(STAGES) - {"convert", "capture"}),
        ({"capture__num_samples": 32}, set(STAGES) - {"convert"}),
        ({"teacher__weights": "model"}, set(STAGES)),
    ],
)
def test_a_changed_setting_makes_out_of_date_what_depends_on_it(
    finished, make_config, change, reruns
):
    from uva_jax.pipeline.engine import _Engine
    from uva_jax.pipeline.stages import stages
    from uva_jax.runtime.settings import check
    from uva_jax.storage.atomic import read_json

    config = check(make_config(**change))
    table = {stage.name: stage for stage in stages(config)}
    engine = _Engine(table, config, finished.workdir, True, lambda name: None)
    changed = {
        name
        for name in STAGES
        if not engine.identify(name).matches(read_json(engine.folder(name) / "done.json"))
    }
    assert changed == reruns


def test_a_changed_setting_reruns_its_stage_and_says_what_changed(finished, make_config, tmp_path):
    workdir = copy(finished, tmp_path)
    config = make_config(export__filename="other.ckpt")
    _, printed = silently(run, config, str(workdir), None)
    assert outcome(printed) == dict.fromkeys(STAGES, "skipped") | {"export": "ran"}
    assert 'export.filename: "grafted.ckpt" -> "other.ckpt"' in printed
    exported = {path.name for path in (workdir / "export").glob("*.ckpt")}
    assert exported == {"other.ckpt", "other_shortened.ckpt"}


def test_a_workdir_of_an_earlier_version_keeps_its_training(finished, make_config, tmp_path):
    workdir = copy(finished, tmp_path)
    # Fine-tuning used to write the assembled policy to grafted/ itself.
    (workdir / "grafted" / "policy").rename(workdir / "policy")
    shutil.rmtree(workdir / "grafted")
    (workdir / "policy").rename(workdir / "grafted")
    _, printed = silently(run, make_config(), str(workdir), ["evaluate", "export"])
    assert outcome(printed) == {"assemble": "ran", "evaluate": "skipped", "export": "skipped"}
    assert "grafted was written by an earlier version, replaced" in printed
    _, printed = silently(run, make_config(), str(workdir), None)
    assert outcome(printed) == dict.fromkeys(STAGES, "skipped")


@pytest.mark.parametrize(
    "setting", [{"pretrain__batch": 0}, {"pretrain__steps": -1}, {"distill__lr": 0.0}]
)
def test_a_number_out_of_range_is_named(make_config, tmp_path, setting):
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=rf"config.{name.replace('__', '.')} is {value}, but"):
        run(make_config(**setting), str(tmp_path), ["convert"])


def test_only_the_named_stages_run(make_config, tmp_path):
    _, printed = silently(run, make_config(), str(tmp_path), ["convert"])
    assert outcome(printed) == {"convert": "ran"}


# ---- bad input: one sentence, nothing half-written ----


def refuses(config, workdir, *words: str, only=None) -> None:
    """Checks that the run raises a one-line UserError with all words and finishes no stage."""
    with pytest.raises(UserError) as caught:
        silently(run, config, str(workdir), only)
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    assert "\n" not in text
    assert list(workdir.glob("*/done.json")) == []
    assert not (workdir / "teacher" / "policy").exists()


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *map(str, args)], cwd=REPO, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (["--config", "configs/nope.py"], "configs/nope.py"),
        (["--config", "configs/pusht_tiny.py", "--config.finetune.stepz=9"], "finetune.steps?"),
        (["--config", "configs/pusht_tiny.py", "--config.finetune.steps=abc"], "abc"),
        (["--config", "configs/pusht_tiny.py", "--config.finetune.lr=nan"], "at most 1"),
        (["--config", "configs/pusht_tiny.py", "--config.finetune.betas=0.9"], "of 2 numbers"),
        (["--config", "configs/pusht_tiny.py", "--config.head.memory=tape"], "'video+aggregate'"),
        (["--config", "configs/pusht_tiny.py", "extra"], "extra"),
        (["--config", "configs/quick_test.py:no/where"], "no/where holds no operators"),
        (["--checkpoint", "no/such.ckpt"], "error: no/such.ckpt does not exist"),
    ],
)
def test_bad_settings_are_one_sentence_and_exit_2(args, words, tmp_path):
    found = command("uva_jax.main", *args, "--workdir", tmp_path / "run")
    assert found.returncode == 2
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert words in found.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_picks_its_own_configuration():
    tiny = f"{REPO}/uva_jax/assets/uva_pusht_tiny.ckpt"
    chosen, override = f"--config={REPO}/configs/pusht_tiny.py", "--config.teacher.checkpoint="
    given = ["main", "--checkpoint", tiny, "--config.seed=1"]
    assert _with_config(given) == ["main", chosen, *given[1:], override + tiny]
    # A configuration that is given stays; the checkpoint is still the one to graft.
    given = ["main", f"--checkpoint={tiny}", "--config=configs/pusht.py"]
    assert _with_config(given) == [*given, override + tiny]


def test_a_stage_that_fails_is_one_sentence_and_exit_2(tmp_path):
    override = f"--config.teacher.checkpoint={tmp_path / 'no.ckpt'}"
    found = command(
        "uva_jax.main", "--config", "configs/pusht_tiny.py", override, "--workdir", tmp_path / "run"
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert "no.ckpt, but there is no such file" in found.stderr


def test_a_missing_checkpoint_is_refused(make_config, tmp_path):
    config = make_config(teacher__checkpoint=str(tmp_path / "no.ckpt"))
    refuses(config, tmp_path / "run", "no.ckpt", "there is no such file")


def test_a_text_file_named_ckpt_is_refused(make_config, tmp_path):
    (tmp_path / "notes.ckpt").write_text("these are not weights\n" * 50)
    refuses(
        make_config(teacher__checkpoint=str(tmp_path / "notes.ckpt")), tmp_path / "run", "notes"
    )


def test_a_truncated_checkpoint_is_refused(make_config, checkpoint, tmp_path):
    data = checkpoint.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: len(data) // 2])
    refuses(make_config(teacher__checkpoint=str(tmp_path / "cut.ckpt")), tmp_path / "run", "cut")


def test_a_checkpoint_without_an_action_head_is_refused(make_config, checkpoint, tmp_path):
    from convert.formats import torch_file

    payload = torch_file.read(checkpoint).payload
    state = {
        name: tensor.numpy()
        for name, tensor in payload["state_dicts"]["ema_model"].items()
        if "diffactloss" not in name
    }
    kept = {"cfg": payload["cfg"], "pickles": {}, "state_dicts": {"ema_model": state}}
    torch_file.write(tmp_path / "headless.ckpt", kept)
    config = make_config(teacher__checkpoint=str(tmp_path / "headless.ckpt"))
    refuses(config, tmp_path / "run", "headless.ckpt", "action head")


def test_an_export_is_no_teacher(finished, make_config, tmp_path):
    path = finished.workdir / "export" / "grafted.ckpt"
    refuses(make_config(teacher__checkpoint=str(path)), tmp_path / "run", "no MLP action head")


def test_a_head_of_another_depth_is_refused(finished, make_config, tmp_path):
    workdir = copy(finished, tmp_path)
    with pytest.raises(UserError, match="head.depth is 5, but the teacher's head has 2 blocks"):
        silently(run, make_config(head__depth=5), str(workdir), None)
    assert not (workdir / "operators" / "done.json").exists()
    assert not (workdir / "operators" / "mlp").exists()


@pytest.fixture
def zarr_config(make_config, finished, tmp_path):
    """f(arrays, episode_ends) -> a configuration that reads such a replay buffer."""

    def make(arrays, ends):
        shapes = {name: (x.shape[1:], x.dtype.name) for name, x in arrays.items()}
        writer = ReplayBufferWriter.create(tmp_path / "data.zarr", shapes, np.array(ends))
        for unit in writer.missing_units():
            start, stop = writer.unit_range(unit)
            writer.write_unit(unit, {name: x[start:stop] for name, x in arrays.items()})
        writer.finish()
        return make_config(data__path=str(tmp_path / "data.zarr"))

    return make


def refuses_to_capture(config, workdir, *words):
    """Checks the same as `refuses` after the conversion."""
    with pytest.raises(UserError) as caught:
        silently(run, config, str(workdir), None)
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    assert "\n" not in text
    assert not (workdir / "activations" / "done.json").exists()
    assert not (workdir / "activations" / "train").exists()


def test_a_replay_buffer_without_images_is_refused(zarr_config, tmp_path):
    config = zarr_config({"action": np.zeros((40, 2), np.float32)}, [40])
    refuses_to_capture(config, tmp_path / "run", "data.zarr", "img")


def test_a_replay_buffer_shorter_than_a_window_is_refused(zarr_config, tmp_path):
    frames = np.zeros((8, 96, 96, 3), np.uint8)
    config = zarr_config({"img": frames, "action": np.zeros((8, 2), np.float32)}, [4, 8])
    refuses_to_capture(config, tmp_path / "run", "10 steps", "chosen has 4")


def test_a_folder_that_is_no_replay_buffer_is_refused(make_config, tmp_path):
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "empty.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    config = make_config(data__path=str(tmp_path / "empty.zarr"))
    refuses_to_capture(config, tmp_path / "run", "empty.zarr")


def test_a_workdir_in_use_is_refused(make_config, tmp_path):
    with locked(tmp_path / "run", print):
        refuses(make_config(), tmp_path / "run", "in use by another run")


def test_a_folder_with_files_of_others_is_left_alone(make_config, tmp_path):
    (tmp_path / "run" / "teacher").mkdir(parents=True)
    (tmp_path / "run" / "teacher" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds files that no stage wrote"):
        silently(run, make_config(), str(tmp_path / "run"), None)
    assert (tmp_path / "run" / "teacher" / "thesis.tex").read_text() == "mine"


def test_a_stage_without_what_it_builds_on_is_refused(make_config, tmp_path):
    refuses(make_config(), tmp_path / "run", "--stage convert", only=["finetune"])


def test_operators_of_another_depth_are_refused(finished, make_config, tmp_path):
    import dataclasses

    head = dataclasses.replace(HEAD, depth=3)
    deep = make_policy(dataclasses.replace(CONFIG, action_head=head))
    export_policy(deep, tmp_path / "deep.ckpt")
    config = make_config(
        teacher__checkpoint=str(tmp_path / "deep.ckpt"),
        head__init_paths__mlp=str(finished.workdir / "operators" / "mlp"),
    )
    with pytest.raises(UserError, match="head of 2 blocks, but this head has 3"):
        silently(run, config, str(tmp_path / "run"), ["convert", "capture", "finetune"])


# ---- the stages as single commands ----


def settings(config) -> list[str]:
    """Returns the options that make a command as small as the tests' runs."""
    names = (
        "data.max_episodes data.cache head.num_heads head.self_attn_heads capture.held_out "
        "capture.batch distill.warmup distill.sampling_steps finetune.freeze"
    ).split()
    found = []
    for name in names:
        node = config
        for key in name.split("."):
            node = node[key]
        found += ["--set", f"{name}={node!r}"]
    return found


def test_the_steps_run_as_commands_of_their_own(make_config, checkpoint, tmp_path, capsys):
    small = settings(make_config())
    source = ["--checkpoint", str(checkpoint)]
    cache, operators, tuned = (str(tmp_path / name) for name in ("cache", "operators", "tuned"))
    samples = ["--num_samples", "16", "--strip", "2"]
    assert steps.main(["cache-activations", *source, *samples, "--out", cache, *small]) == 0
    for layer in ("cross_attn", "self_attn", "mlp"):
        budget = ["--epochs", "1", "--batch", "8", "--loss", "huber"]
        given = ["--cache", cache, "--target_layer", layer, "--out", operators]
        assert steps.main(["distill-operator", *given, *budget, *small]) == 0
        assert (tmp_path / "operators" / layer / "operator.json").exists()
    budget = ["--steps", "2", "--warmup", "1", "--batch", "8", "--data_fraction", "0.5"]
    given = ["fine-tune", *source, "--operators", operators, "--out", tuned]
    capsys.readouterr()
    assert steps.main([*given, *budget, *small, "--set", "capture.strip=2"]) == 0
    printed = capsys.readouterr().out
    for layer in ("cross_attn", "self_attn", "mlp"):
        assert f"{layer} operators from {operators}/{layer}" in printed
    assert policy_folder.load_policy(tmp_path / "tuned" / "finetune" / "policy").config.action_head


def test_a_finished_workdir_serves_a_single_distillation(finished, make_config, tmp_path, capsys):
    given = ["--cache", str(finished.workdir), "--target_layer", "mlp", "--out", str(tmp_path)]
    given += ["--operators", str(finished.workdir / "operators"), "--epochs", "1", "--batch", "8"]
    assert steps.main(["distill-operator", *given, *settings(make_config())]) == 0
    assert steps.main(["distill-operator", *given, *settings(make_config())]) == 0
    assert "distill-mlp: skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, words",
    [
        (["distill-operator", "--cache", "no/where", "--target_layer", "cross_attn"], "no/where"),
        (["distill-operator", "--cache", "no/where", "--target_layer", "mlp"], "cross_attn first"),
        (["fine-tune", "--operators", "no/where"], "no/where holds no operators"),
        (["quick-test", "--operators", "no/where"], "no/where holds no operators"),
        (["cache-activations", "--checkpoint", "no.ckpt"], "there is no such file"),
        (["cache-activations", "--set", "capture.sample=3"], "capture.sample is not a setting"),
    ],
)
def test_commands_say_bad_input_in_a_sentence(args, words, tmp_path, capsys):
    assert steps.main([*args, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert words in printed


def test_commands_take_their_defaults_from_the_configuration():
    from configs import common

    parser = steps._parser()
    args = parser.parse_args(["cache-activations", "--out", "x"])
    assert steps._config(args, steps._CACHE) == common.get_config()
