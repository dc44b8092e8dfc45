"""Checks windows, frames, normalisation, resizing and optimisation against a data_path file."""

from __future__ import annotations

import functools
import random
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from convert.checks.compare import Checks
from convert.checks.golden import SINGLE, Golden
from uva_jax.data import normalizer, observations, sequences
from uva_jax.models.policy import Policy, resize_bilinear
from uva_jax.runtime.errors import UserError
from uva_jax.train.optim import OptimOptions, ema_decay, ema_update, make_optimizer, warmup_cosine

_FLOAT32 = 2e-6  # relative, for a handful of float32 operations


def check(golden: Golden, checks: Checks) -> None:
    """Runs every check of a data_path file that this project's training data path has code for."""
    _frames(golden, checks)
    _windows(golden, checks)
    _trajectories(golden, checks)
    _resize(golden, checks)
    _normalizers(golden, checks)
    _sampler(golden, checks)
    _ema(golden, checks)
    _learning_rate(golden, checks)
    _adamw(golden, checks)


def _compare(golden: Golden, checks: Checks, key: str, got, relative: float) -> None:
    want = golden[key]
    scale = float(np.abs(want.astype(np.float64)).max(initial=0.0))
    checks.compare(key, got, want, relative * max(scale, 1e-30))


def _frames(golden: Golden, checks: Checks) -> None:
    for name, want in golden.facts["select_frames"].items():
        length, kind = re.fullmatch(r"T(\d+)_(\w+)", name).groups()
        try:
            got = sequences.select_frames(int(length), train=kind == "train")
        except UserError:
            got = np.zeros(0)
        # A length for which the original fails must fail here too.
        expected = np.zeros(0) if isinstance(want, str) else np.array(want)
        checks.compare(f"select_frames/{name}", got, expected, 0.0)
    table = golden.facts["history_combinations"]["all"]
    checks.compare("history_combinations", sequences.history_combinations(), np.array(table), 0.0)


def _windows(golden: Golden, checks: Checks) -> None:
    facts = golden.facts
    table = sequences.history_combinations()
    for entry in facts.get("select_frames_different_history_freq", []):
        # Python's choice among a list draws one place in it.
        drawn = table[random.Random(entry["py_seed"]).choice(range(len(table)))]
        picks = observations.window_picks(32, train=True, history=drawn)
        key = f"select_frames_different_history_freq/{entry['py_seed']}"
        checks.compare(key, picks, np.array(entry["indices"]), 0.0)
    for case in golden.children("proc/"):
        prefix, train = f"proc/{case}", "_train" in case
        obs = {k.rsplit("/", 1)[1]: golden[k] for k in golden.keys(f"{prefix}/in/")}
        own = obs.pop("img_indices", None)  # the data set chose the frames, each sample its own
        if own is not None:
            picks = own[..., 0].astype(np.int64)
        else:
            draw = random.Random(facts["py_seed_for_dhf"]).choice(range(len(table)))
            drawn = table[draw] if train and case.endswith("_dhf") else None
            picks = observations.window_picks(obs["image"].shape[1], train=train, history=drawn)
        checks.compare(f"{prefix}/out/indices", picks, golden[f"{prefix}/out/indices"], 0.0)
        history, future = observations.split_window(
            obs,
            train=train,
            picks=picks,
            states_at_frames=case.endswith("_dhf") or own is not None,
        )
        frames = np.concatenate([history["image"], *([future["image"]] if train else [])], axis=1)
        _compare(golden, checks, f"{prefix}/out/x", _pixels(frames), _FLOAT32)
        found = {"second_image": history.get("wrist_image")}
        found["pred_second_image"] = future.get("wrist_image")
        for name in sorted(set(obs) - set(observations.IMAGES)):
            short = "state" if name == "agent_pos" else name
            found |= {short: history[name], f"{short}_pred": future.get(name)}
        for name, value in found.items():
            key = f"{prefix}/out/prop/{name}"
            # What the original gives as None is not recorded, and must be missing here too.
            checks.compare(f"{key} is there", value is not None, key in golden, 0.0)
            if value is not None and key in golden:
                value = _pixels(value) if name.endswith("second_image") else value
                _compare(golden, checks, key, value, _FLOAT32 if value.ndim == 5 else 0.0)


def _pixels(images: np.ndarray) -> np.ndarray:
    """Images (b, t, c, h, w) in [0, 1] as the policy takes them, in the original's layout."""
    images = jnp.asarray(rearrange(images, "b t c h w -> b t h w c"))
    # They are recorded without resizing: a size of their own switches it off.
    sized = types.SimpleNamespace(config=types.SimpleNamespace(image_size=images.shape[-2]))
    return np.asarray(rearrange(Policy.preprocess(sized, images), "b t h w c -> b c t h w"))


def _trajectories(golden: Golden, checks: Checks) -> None:
    for case in golden.children("traj/"):
        prefix = f"traj/{case}"
        length, shift, history = map(int, re.fullmatch(r"T(\d+)_shift(\d)_hist(\d)", case).groups())
        actions = golden[f"{prefix}/in"]
        past, window = sequences.action_window(actions, length, bool(shift), bool(history))
        checks.compare(f"{prefix}/trajectory", window, golden[f"{prefix}/trajectory"], 0.0)
        if f"{prefix}/history" in golden:
            checks.compare(f"{prefix}/history", past, golden[f"{prefix}/history"], 0.0)


def _resize(golden: Golden, checks: Checks) -> None:
    for size in golden.children("resize/"):
        prefix = f"resize/{size}"
        image = golden[f"{prefix}/in_uint8"].astype(np.float32) / np.float32(255)
        got = resize_bilinear(jnp.asarray(rearrange(image, "c h w -> h w c")), 256)
        got = np.asarray(rearrange(got, "h w c -> c h w"))
        found = {"out": got, "out_channel0_rows_stride3": got[0, ::3], "out_mean": got.mean()}
        for name, value in found.items():
            if f"{prefix}/{name}" in golden:
                _compare(golden, checks, f"{prefix}/{name}", value, _FLOAT32)


def _normalizers(golden: Golden, checks: Checks) -> None:
    data, query = golden["norm/data"], golden["norm/query"]
    for case in golden.children("norm/"):
        match = re.fullmatch(r"(limits|gaussian)_offset(\d)", case)
        if not match:
            continue
        prefix = f"norm/{case}"
        field = normalizer.fit_field(data, mode=match[1], fit_offset=match[2] == "1")
        _field(golden, checks, f"{prefix}/params_dict", field)
        found = {
            "normalized_query": normalizer.normalize(query, field),
            "normalized_data": normalizer.normalize(data, field),
            "unnormalized_query": normalizer.unnormalize(query, field),
        }
        for name, value in found.items():
            _compare(golden, checks, f"{prefix}/{name}", value, _FLOAT32)
    prefix = "norm/pusht_like"
    if golden.keys(prefix):
        # A policy's normalizer, fitted to the first four columns.
        fields = {
            "action": normalizer.fit_field(data[..., :2]),
            "agent_pos": normalizer.fit_field(data[..., 2:4]),
            "image": normalizer.image_field(),
        }
        for name, field in fields.items():
            _field(golden, checks, f"{prefix}/params_dict.{name}", field)
        got = normalizer.normalize(query[..., :2], fields["action"])
        _compare(golden, checks, f"{prefix}/action_normalized", got, _FLOAT32)


def _field(golden: Golden, checks: Checks, prefix: str, field: dict) -> None:
    for name in ("offset", "scale"):
        _compare(golden, checks, f"{prefix}.{name}", field[name], _FLOAT32)
    for name, value in field["input_stats"].items():
        _compare(golden, checks, f"{prefix}.input_stats.{name}", value, _FLOAT32)


def _sampler(golden: Golden, checks: Checks) -> None:
    ends = golden["sampler/episode_ends"]
    for case in golden.children("sampler/"):
        match = re.fullmatch(r"h(\d+)_b(\d+)_a(\d+)", case)
        if match:
            length, before, after = map(int, match.groups())
            got = sequences.create_indices(ends, length, pad_before=before, pad_after=after)
            key = f"sampler/{case}/indices"
            checks.compare(key, got, golden[key], 0.0)
    # The samples and the masked index table were made with the first case's settings.
    windows = functools.partial(sequences.create_indices, ends, 32, pad_before=1, pad_after=7)
    rows, steps = sequences.window_rows(windows(), 32), np.arange(ends[-1])
    for picked in golden["sampler/picked"]:
        prefix, row = f"sampler/sample{picked}", rows[picked]
        action = np.stack([steps, steps / 2], axis=1)[row]
        checks.compare(f"{prefix}/action", action, golden[f"{prefix}/action"], 0.0)
        image = (steps % 256)[row][:, None]
        checks.compare(f"{prefix}/img", image, golden[f"{prefix}/img"], 0.0)
    mask = ~golden["sampler/masked_val_mask"]
    key = "sampler/masked_indices"
    checks.compare(key, windows(episode_mask=mask), golden[key], 0.0)
    for name, want in golden.facts["val_mask"].items():
        count, ratio, seed = re.fullmatch(r"n(\d+)_r([\d.]+)_s(\d+)", name).groups()
        held_out = sequences.validation_mask(int(count), float(ratio), int(seed))
        checks.compare(f"val_mask/{name}/val", np.flatnonzero(held_out), want["val"], 0.0)
        kept = sequences.downsample_mask(~held_out, want["max_n"], int(seed))
        key = f"val_mask/{name}/train_downsampled"
        checks.compare(key, np.flatnonzero(kept), want["train_downsampled"], 0.0)


def _ema(golden: Golden, checks: Checks) -> None:
    for key in golden.keys("ema/decay_"):
        power, after = re.fullmatch(r"ema/decay_power([\d.]+)_after(\d+)", key).groups()
        # Two thirds is written with four digits in the name.
        exponent = 2 / 3 if power == "0.6667" else float(power)
        steps = jnp.arange(len(golden[key]))
        got = ema_decay(steps, power=exponent, update_after_step=int(after))
        checks.compare(key, got, golden[key], _FLOAT32)
    # Before update i (from 1) every parameter of the recorded net grows by 0.1 i. Its frozen bias
    # and its batch norm are copies in the original; here only what trains has an average.
    moved = jnp.asarray(golden["ema/step0/model/0.weight"])
    average = jnp.asarray(golden["ema/step0/ema/0.weight"])
    steps = [name for name in golden.children("ema/") if name.startswith("step")]
    for step in range(1, len(steps)):
        moved = moved + 0.1 * step
        average = ema_update(average, moved, step - 1, power=0.75, max_value=0.9999)
        _compare(golden, checks, f"ema/step{step}/ema/0.weight", average, _FLOAT32)


def _learning_rate(golden: Golden, checks: Checks) -> None:
    for key in golden.keys("f64/lr/"):
        warm, total = map(int, re.fullmatch(r"f64/lr/cosine_warm(\d+)_total(\d+)", key).groups())
        schedule = warmup_cosine(1e-4, warm, total)
        got = jax.vmap(schedule)(jnp.arange(len(golden[key])))
        _compare(golden, checks, key, got, _FLOAT32)


def _adamw(golden: Golden, checks: Checks) -> None:
    names = [key.rsplit("/", 1)[1] for key in golden.keys("adamw/step0/")]
    if not names:
        return
    params = {name: jnp.asarray(golden[f"adamw/step0/{name}"]) for name in names}
    options = OptimOptions(lr=1e-2, warmup_steps=2, total_steps=8, clip_norm=None)
    optimizer = make_optimizer(options)
    state = optimizer.init(params)
    for step in range(1, len(golden.children("adamw/"))):
        prefix = f"adamw/step{step}"
        grads = {name: jnp.asarray(golden[f"{prefix}/grad_{name}"]) for name in names}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rate = warmup_cosine(options.lr, options.warmup_steps, options.total_steps)(step - 1)
        checks.compare(f"{prefix}/lr", rate, golden[f"{prefix}/lr"], SINGLE * options.lr)
        for name in names:
            _compare(golden, checks, f"{prefix}/{name}", params[name], SINGLE)
