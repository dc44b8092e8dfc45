"""Settings are declared once, and an impossible configuration is refused in one sentence."""

import dataclasses
import importlib
import math
import subprocess
import sys
import typing

import pytest
from conftest import REPO
from ml_collections import ConfigDict

from configs import common
from uva_jax.__main__ import main
from uva_jax.pipeline.stages import stages
from uva_jax.runtime import settings
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DataOptions, EMAOptions, LoopOptions
from uva_jax.runtime.sections_graft import FinetuneOptions
from uva_jax.runtime.settings import assign, check, leaves, section, specs
from uva_jax.storage.identity import Identity, shaping_values

FILES = "common pusht_tiny pretrain_tiny pusht pusht_multitask libero10 toolhang umi_multi".split()


def changed(**values) -> ConfigDict:
    """Returns the defaults with some settings changed; "__" in names stands for "."."""
    config = common.get_config()
    for name, value in values.items():
        assign(config, name.replace("__", "."), value)
    return config


def refusal(config) -> str:
    with pytest.raises(UserError) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- declarations ----


@pytest.mark.parametrize("name", specs())
def test_every_setting_has_a_comment_and_every_number_a_range(name):
    spec = specs()[name]
    assert spec.rule.comment
    assert spec.refusal(spec.default) is None
    kinds = {spec.kind, *typing.get_args(spec.kind)}
    if kinds & {int, float}:
        assert spec.rule.range
        assert any(not spec.rule.allows(x) for x in (-1e9, 1e9))
        assert not any(spec.rule.allows(x) for x in (math.nan, math.inf))


def test_the_configuration_holds_the_declared_settings():
    found = leaves(common.get_config())
    assert set(found) == set(specs())
    for name, spec in specs().items():
        value = found[name]
        assert (value.to_dict() if isinstance(value, ConfigDict) else value) == spec.default


@pytest.mark.parametrize("name", FILES)
def test_the_configurations_that_ship_pass_the_check(name):
    assert check(importlib.import_module(f"configs.{name}").get_config())


def test_a_section_comes_out_as_its_dataclass():
    config = changed(finetune__ema__max_value=0.5, finetune__unfreeze_at={"9": ("mar",)})
    found = section(check(config).finetune, FinetuneOptions)
    assert found.ema == EMAOptions(max_value=0.5)
    assert found.unfreeze_at == {"9": ("mar",)}
    assert found == dataclasses.replace(
        FinetuneOptions(), ema=EMAOptions(max_value=0.5), unfreeze_at={"9": ("mar",)}
    )
    # The settings of policy training include all settings of a loop.
    assert section(config.pretrain, LoopOptions).steps == 100_000


def test_a_list_of_a_file_does_for_a_tuple():
    found = section(check(changed(finetune__betas=[0.8, 0.9])).finetune, FinetuneOptions)
    assert found.betas == (0.8, 0.9)


def test_the_command_lists_settings_by_a_part_of_their_name(capsys):
    assert main(["settings", "finetune.l*r"]) == 0
    printed = capsys.readouterr().out
    assert "finetune.lr = 0.0001  (above 0 and at most 1)\n    learning rate" in printed
    assert "distill" not in printed
    assert main(["settings"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} = " in printed for name in specs())
    assert main(["settings", "nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_check_does_not_wait_for_jax():
    program = (
        "import sys; from configs import pusht_tiny; from uva_jax.runtime.settings import check; "
        "import uva_jax.main; check(pusht_tiny.get_config()); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO).returncode == 0


# ---- names ----


@pytest.mark.parametrize(
    "name, close",
    [
        ("finetune.stepz", "config.finetune.steps"),
        ("pretrain.vae_training.em.power", "config.pretrain.vae_training.ema.power"),
        ("sed", "config.seed"),
        ("betas", "config.finetune.betas"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(name, close):
    with pytest.raises(UserError, match=f"config.{name} is not a setting .*did you mean {close}"):
        assign(common.get_config(), name, 1)


@pytest.mark.parametrize("name", ["finetune.rate", "finetune.ema.rate", "rate", "rates"])
def test_an_unknown_key_anywhere_is_refused(name):
    config = common.get_config()
    *parents, last = name.split(".")
    node = config
    for key in parents:
        node = node[key]
    with node.unlocked():
        node[last] = {} if name == "rates" else 1
    assert f"config.{name} is not a setting" in refusal(config)


def test_a_mapping_of_free_keys_is_set_as_a_whole():
    settings.check_name("finetune.unfreeze_at.500")
    with pytest.raises(UserError, match="give all of config.finetune.unfreeze_at as one mapping"):
        settings.check_name("finetune.unfreeze_at.500", inside=False)
    with pytest.raises(UserError, match="config.finetune.ema is a section"):
        settings.check_name("finetune.ema")


def test_a_missing_setting_is_named():
    config = common.get_config()
    with config.unlocked():
        del config.finetune["lr"]
    assert "config.finetune.lr is missing" in refusal(config)


# ---- values ----


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("finetune.lr", 1e6, "must be above 0 and at most 1"),
        ("finetune.lr", math.nan, "must be above 0 and at most 1"),
        ("finetune.lr", 0.0, "must be above 0 and at most 1"),
        ("distill.block_lr", -1e-4, "must be 0 or more and at most 1"),
        ("finetune.clip_norm", math.inf, "must be 0 or more"),
        ("finetune.betas", 0.9, "should be a tuple of 2 numbers"),
        ("finetune.betas", (0.9,), "should be a tuple of 2 numbers"),
        ("finetune.betas", (0.9, 1.0), "must be each 0 or more and below 1"),
        ("finetune.weight_decay", -0.1, "must be 0 or more"),
        ("finetune.ema.max_value", 1.0, "must be 0 or more and below 1"),
        ("finetune.ema.inv_gamma", 0.0, "must be above 0"),
        ("finetune.data_fraction", 1.5, "must be above 0 and at most 1"),
        ("finetune.lora_rank", 0, "must be above 0"),
        ("finetune.steps", 0, "must be above 0"),
        ("finetune.steps", 10.5, "should be a whole number"),
        ("finetune.steps", True, "should be a whole number"),
        ("finetune.freeze", "mar", "should be a tuple of texts"),
        ("finetune.unfreeze_at", {"soon": ("mar",)}, "keys must be numbers of steps"),
        ("finetune.unfreeze_at", {"9": "mar"}, "a mapping whose values are each a tuple of texts"),
        ("data.val_ratio", 1.0, "must be 0 or more and below 1"),
        ("mesh.data", 0, "must be -1, or 1 or more"),
        ("mesh.fsdp", 0, "must be 1 or more"),
        ("seed", -1, "must be 0 or more"),
        ("pretrain.model.dropout", 1.0, "must be 0 or more and below 1"),
        ("pretrain.model.video_head", (1024,), "should be a tuple of 2 whole numbers"),
        ("pretrain.model.vae_multipliers", (), "at least one level"),
        ("pretrain.augment.crop", 0.0, "must be above 0 and at most 1"),
        ("pretrain.modes", {"policy": 1.0}, "'policy' is no task mode"),
        ("pretrain.modes", {"policy_model": -1.0}, "must be each 0 or more"),
        ("pretrain.modes", {"policy_model": 0.0}, "needs a share above 0"),
        ("distill.operators", ("mlp", "conv"), "can be 'cross_attn', 'self_attn', 'mlp'"),
        ("distill.loss.mlp", "l3", "can be 'l1', 'l2', 'huber'"),
        ("evaluate.sampling_steps", "ten", "'ten' is no number of sampling steps"),
        ("evaluate.sampling_steps", "0", "'0' is no number of sampling steps"),
        ("evaluate.sampling_steps", "1001", "cannot give 1001 steps"),
        ("evaluate.sampling_steps", "logsnr900", "900 of 1000 diffusion steps cannot be spaced"),
        ("evaluate.sampling_steps", "logsnr0", "and at least 1"),
        ("evaluate.sampling_steps", "ddim300", "no integer stride gives 300"),
        ("export.filename", "../mine.ckpt", "without a folder"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_would_do(name, value, words):
    found = refusal(changed(**{name.replace(".", "__"): value}))
    assert found.startswith(f"config.{name} ")
    assert words in found


@pytest.mark.parametrize("steps", ["", "100", "10", "10,20", "ddim50", "logsnr10"])
def test_sampling_steps_are_what_a_schedule_takes(steps):
    assert check(changed(evaluate__sampling_steps=steps))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"finetune__steps": 500}, "config.finetune.warmup is 1000, which leaves nothing of"),
        ({"pretrain__vae_training__steps": 50}, "config.pretrain.vae_training.warmup is 100"),
        (
            {"finetune__accumulate": 3},
            "config.finetune.batch is 256, which cannot be divided into 3",
        ),
        (
            {"pretrain__vae_training__decode_every": 5},
            "but must divide config.pretrain.vae_training.batch=48",
        ),
        ({"pretrain__score__every": 1500}, "config.pretrain.score.every is 1500, but"),
        ({"pretrain__model__wrist": True}, "config.pretrain.model.wrist needs config"),
        ({"pretrain__model__heads": 7}, "does not divide config.pretrain.model.width=768"),
        ({"data__pad_after": 20}, "at most half of config.data.horizon=32"),
        ({"distributed__num_processes": 2}, "belong together"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, words):
    assert words in refusal(changed(**values))


def test_no_steps_need_no_warm_up():
    assert check(changed(pretrain__vae_training__steps=0, pretrain__vae_training__warmup=100))


# ---- finished runs ----

# Hashes of the defaults by stage. Removing a setting, changing its default, or adding one without
# `added=True` changes the hash of the stages that read its section, which then run again.
HASHES = {
    "vae": "ad7ae3b35b5eb206",
    "encode": "750342703a6edd70",
    "pretrain": "10d841b8fbe7958a",
    "convert": "a5b14154f5eecaea",
    "capture": "0423e113831e52f4",
    "finetune": "dd6bcfbdfbeb9aad",
    "evaluate": "9592fc722ecd2499",
    "export": "6ea0286fde71c751",
}


def test_what_earlier_runs_finished_is_still_up_to_date():
    config = settings.defaults()
    found = {}
    for stage in stages(config):
        values = shaping_values(config.to_dict(), stage.config_keys)
        values = {k: v for k, v in values.items() if settings.shapes_results(k, v)}
        found[stage.name] = Identity(values, {}).config_hash
    assert {name: found[name][:16] for name in HASHES} == HASHES


def test_data_options_say_whether_the_data_ship_with_the_package():
    assert DataOptions().embedded and not DataOptions(path="mine.zarr").embedded
