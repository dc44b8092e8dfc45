"""Checks windows, frames, normalisation, resizing and optimisation against a data_path file."""

from __future__ import annotations

import dataclasses
import random
import re
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from convert.checks.compare import Checks
from convert.checks.golden import SINGLE, Golden
from uva_jax.data import normalizer, windows
from uva_jax.data.episodes import validation_mask
from uva_jax.models.frames import frame_indices
from uva_jax.models.policy import Policy, resize_bilinear
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DataOptions
from uva_jax.train.optim import OptimOptions, ema_decay, ema_update, make_optimizer, warmup_cosine

_FLOAT32 = 2e-6  # relative, for a handful of float32 operations


def check(golden: Golden, checks: Checks) -> None:
    """Runs every check of a data_path file for which this project has code."""
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
            got = np.array(frame_indices(int(length), train=kind == "train"))
        except UserError:
            got = np.zeros(0)
        # Lengths for which the original fails must fail here too.
        expected = np.zeros(0) if isinstance(want, str) else np.array(want)
        checks.compare(f"select_frames/{name}", got, expected, 0.0)
        if kind == "train" and len(expected) and int(length) % 2 == 0:
            rows = whole_window(int(length))
            got = np.concatenate([rows["frames"], rows["future_frames"]])
            checks.compare(f"select_frames/{name}/window", got, expected, 0.0)
    table = golden.facts["history_combinations"]["all"]
    checks.compare("history_combinations", windows.history_combinations(), np.array(table), 0.0)


def whole_window(
    n_steps: int, *, train: bool = True, history: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns the positions that a policy reads of a recorded window, by the rule of every run.

    Args:
      n_steps: length of the window, which is treated as a whole episode.
      train: the second half of the window is the future.
      history: (n_frames,) or (b, n_frames) positions of the observed frames, if they are drawn.
    """
    n_obs = n_steps // 2 if train else n_steps
    spec = windows.WindowSpec(
        n_frames=4, n_obs_steps=n_obs, n_actions=n_steps - n_obs, state_steps=n_obs
    )
    current = n_obs - 1
    offsets = spec.offsets(None if history is None else np.asarray(history) - current)
    found = offsets._asdict()
    return {k: windows.buffer_rows(0, n_steps - 1, current, v) for k, v in found.items()}


def _windows(golden: Golden, checks: Checks) -> None:
    facts = golden.facts
    table = windows.history_combinations()
    for entry in facts.get("select_frames_different_history_freq", []):
        # Python's choice from a list draws one index.
        drawn = table[random.Random(entry["py_seed"]).choice(range(len(table)))]
        rows = whole_window(32, history=drawn)
        picks = np.concatenate([rows["frames"], rows["future_frames"]])
        key = f"select_frames_different_history_freq/{entry['py_seed']}"
        checks.compare(key, picks, np.array(entry["indices"]), 0.0)
    for case in golden.children("proc/"):
        _window(golden, checks, f"proc/{case}")


def read_window(
    obs: Mapping[str, np.ndarray], *, train: bool, spaced: bool, drawn: np.ndarray | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the arrays that a policy reads of a recorded window.

    Args:
      obs: upstream's inputs: images (b, t, c, h, w), states (b, T, k), and "img_indices" if the
        data set has selected the frames.
      train: the window also holds the future.
      spaced: frames are spaced at random, and states are read only at the frames.
      drawn: (4,) drawn positions of the history's frames.

    Returns:
      arrays by name, those of the future with the suffix "/future", and the frames' positions.
    """
    obs = dict(obs)
    chosen = obs.pop("img_indices", None)  # each sample's own
    n_steps = max(value.shape[1] for value in obs.values())
    history, found = drawn, {}
    if chosen is not None:
        history = chosen[:, :4, 0].astype(np.int64)
    elif spaced and not train:
        history = whole_window(n_steps, train=False)["frames"]
    rows = whole_window(n_steps, train=train, history=history)
    picks = rows["frames"]
    if train:
        picks = np.concatenate(
            np.broadcast_arrays(picks, rows["future_frames"])
            if picks.ndim == 1
            else [picks, chosen[:, 4:, 0].astype(np.int64)],
            axis=-1,
        )
    for name, value in obs.items():
        if name in ("image", "wrist_image"):
            frames = value if chosen is not None else value[:, picks]
            found[name] = frames[:, :4]
            if train:
                found[f"{name}/future"] = frames[:, 4:]
            continue
        states = rows["states"]
        found[name] = (
            value[:, states]
            if states.ndim == 1
            else np.take_along_axis(value, states[..., None], axis=1)
        )
        if train:
            found[f"{name}/future"] = value[:, rows["future_states"]]
    return found, picks


def _window(golden: Golden, checks: Checks, prefix: str) -> None:
    train, spaced = "_train" in prefix, prefix.endswith("_dhf")
    obs = {k.rsplit("/", 1)[1]: golden[k] for k in golden.keys(f"{prefix}/in/")}
    table = windows.history_combinations()
    draw = random.Random(golden.facts["py_seed_for_dhf"]).choice(range(len(table)))
    read, picks = read_window(
        obs, train=train, spaced=spaced, drawn=table[draw] if train and spaced else None
    )
    checks.compare(f"{prefix}/out/indices", picks, golden[f"{prefix}/out/indices"], 0.0)
    frames = [read[k] for k in ("image", "image/future") if k in read]
    _compare(golden, checks, f"{prefix}/out/x", _pixels(np.concatenate(frames, 1)), _FLOAT32)
    found = {"second_image": read.get("wrist_image")}
    found["pred_second_image"] = read.get("wrist_image/future")
    for name in sorted(set(obs) - {"image", "wrist_image", "img_indices"}):
        short = "state" if name == "agent_pos" else name
        found |= {short: read[name], f"{short}_pred": read.get(f"{name}/future")}
    for name, value in found.items():
        key = f"{prefix}/out/prop/{name}"
        # Outputs that are None in the original are not recorded, and must be missing here too.
        checks.compare(f"{key} is there", value is not None, key in golden, 0.0)
        if value is not None and key in golden:
            value = _pixels(value) if name.endswith("second_image") else value
            _compare(golden, checks, key, value, _FLOAT32 if value.ndim == 5 else 0.0)


def _pixels(images: np.ndarray) -> np.ndarray:
    """Preprocesses images (b, t, c, h, w) in [0, 1] as the policy does, keeping the layout."""
    images = jnp.asarray(rearrange(images, "b t c h w -> b t h w c"))
    # They are recorded without resizing, which their own size switches off.
    sized = types.SimpleNamespace(config=types.SimpleNamespace(image_size=images.shape[-2]))
    return np.asarray(rearrange(Policy.preprocess(sized, images), "b t h w c -> b c t h w"))


def action_rows(length: int, *, shift: bool, history: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of past actions and actions in a window, by the rule of every run.

    Args:
      length: steps of the window.
      shift: actions begin at the current step; otherwise one step later.
      history: past actions are an input; the horizon is then one step longer (33), and the current
        step one later.
    """
    current = length // 2 if history else length // 2 - 1
    spec = windows.WindowSpec(
        n_frames=4,
        n_obs_steps=16,
        # As upstream, a horizon of 32 with the history leaves 15 actions.
        n_actions=min(length // 2, length - current - 1),
        action_offset=0 if shift else 1,
        past_actions=length // 2,
    )
    offsets = spec.offsets()
    return tuple(
        windows.buffer_rows(0, length - 1, current, o)
        for o in (offsets.past_actions, offsets.actions)
    )


def _trajectories(golden: Golden, checks: Checks) -> None:
    for case in golden.children("traj/"):
        prefix = f"traj/{case}"
        length, shift, history = map(int, re.fullmatch(r"T(\d+)_shift(\d)_hist(\d)", case).groups())
        past, window = action_rows(length, shift=bool(shift), history=bool(history))
        actions = golden[f"{prefix}/in"]
        checks.compare(
            f"{prefix}/trajectory", actions[:, window], golden[f"{prefix}/trajectory"], 0.0
        )
        if f"{prefix}/history" in golden:
            checks.compare(f"{prefix}/history", actions[:, past], golden[f"{prefix}/history"], 0.0)


def _resize(golden: Golden, checks: Checks) -> None:
    for size in golden.children("resize/"):
        prefix = f"resize/{size}"
        image = golden[f"{prefix}/in_uint8"].astype(np.float32) / np.float32(255)
        got = resize_bilinear(jnp.asarray(rearrange(image, "c h w -> h w c")), (256, 256))
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
        # A policy's normaliser, fitted to the first four columns.
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


def sampler_indices(
    ends: np.ndarray,
    horizon: int,
    *,
    pad_before: int,
    pad_after: int,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the windows that every run plans, as rows of upstream's index table (n, 4).

    Here any step may be a current step; upstream's windows begin at most `pad_before` steps before
    the episode, so earlier ones are left out.
    """
    options = dataclasses.replace(DataOptions(), horizon=horizon, pad_after=pad_after)
    mask = np.ones(len(ends), bool) if mask is None else mask
    strips = windows.plan_strips(ends, mask, strip=1, stride=1, options=options, seed=0)
    starts = np.append(0, ends[:-1])
    first, last = starts[strips.episode], ends[strips.episode] - 1
    begin = strips.current[:, 0] - (horizon // 2 - 1)
    kept = begin >= -pad_before
    order = np.lexsort((begin[kept], strips.episode[kept]))
    first, last, current = (x[kept][order, None] for x in (first, last, strips.current[:, 0]))
    rows = windows.buffer_rows(first, last, current, np.arange(horizon) - (horizon // 2 - 1))
    real = (rows[:, 1:] != rows[:, :-1]).sum(1) + 1  # steps without repetitions
    padded = np.maximum(-begin[kept][order], 0)
    return np.stack([rows[:, 0], rows[:, 0] + real, padded, padded + real], axis=1)


def _sampler(golden: Golden, checks: Checks) -> None:
    ends = golden["sampler/episode_ends"]
    for case in golden.children("sampler/"):
        match = re.fullmatch(r"h(\d+)_b(\d+)_a(\d+)", case)
        if match:
            length, before, after = map(int, match.groups())
            # With a padding of more than half a window the current step would be past the episode.
            after = min(after, length // 2)
            got = sampler_indices(ends, length, pad_before=before, pad_after=after)
            key = f"sampler/{case}/indices"
            want = golden[key]
            current = want[:, 0] - want[:, 2] + length // 2 - 1
            inside = current < ends[np.searchsorted(ends, want[:, 0], side="right")]
            checks.compare(key, got, want[inside], 0.0)
    # The samples and the masked index table were made with the first case's settings.
    indices = golden["sampler/h32_b1_a7/indices"]
    steps = np.arange(ends[-1])
    for picked in golden["sampler/picked"]:
        prefix, start = f"sampler/sample{picked}", indices[picked]
        episode = np.searchsorted(ends, start[0], side="right")
        first = np.append(0, ends)[episode]
        current = start[0] - first - start[2] + 15
        row = windows.buffer_rows(first, ends[episode] - 1, current, np.arange(-15, 17))
        action = np.stack([steps, steps / 2], axis=1)[row]
        checks.compare(f"{prefix}/action", action, golden[f"{prefix}/action"], 0.0)
        image = (steps % 256)[row][:, None]
        checks.compare(f"{prefix}/img", image, golden[f"{prefix}/img"], 0.0)
    got = sampler_indices(
        ends, 32, pad_before=1, pad_after=7, mask=~golden["sampler/masked_val_mask"]
    )
    checks.compare("sampler/masked_indices", got, golden["sampler/masked_indices"], 0.0)
    for name, want in golden.facts["val_mask"].items():
        count, ratio, seed = re.fullmatch(r"n(\d+)_r([\d.]+)_s(\d+)", name).groups()
        held_out = validation_mask(int(count), float(ratio), int(seed))
        checks.compare(f"val_mask/{name}/val", np.flatnonzero(held_out), want["val"], 0.0)


def _ema(golden: Golden, checks: Checks) -> None:
    for key in golden.keys("ema/decay_"):
        power, after = re.fullmatch(r"ema/decay_power([\d.]+)_after(\d+)", key).groups()
        # The name holds two thirds with four digits.
        exponent = 2 / 3 if power == "0.6667" else float(power)
        steps = jnp.arange(len(golden[key]))
        got = ema_decay(steps, power=exponent, update_after_step=int(after))
        checks.compare(key, got, golden[key], _FLOAT32)
    # Before update i (from 1) every parameter of the recorded net grows by 0.1 i. The original
    # copies its frozen bias and batch norm; here only trained parameters have an average.
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
