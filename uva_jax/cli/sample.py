"""Samples a policy's video and actions and compares them with the recording:

    python -m uva_jax sample --policy runs/tiny/teacher/policy --dataset embedded --windows 4 \\
        --mode full_dynamic_model --out video.mp4

A window is 16 steps of history and 16 of future, with four frames of each.
`--obs FILE` takes an observation in place of `--dataset`: an .npz without batch axes, with "image"
(16 or 4 frames, h, w, 3) uint8 and the other inputs of the policy by name: "wrist_image",
"text_latents", "past_action", the states of its proprioception, and "action" for dynamic_model. It
may also hold the future frames, "future_image" and "future_wrist_image".
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uva_jax.runtime.errors import UserError, exit_status
from uva_jax.runtime.respacing import SAMPLERS
from uva_jax.runtime.settings import section, specs
from uva_jax.runtime.startup import quiet_libraries

# Modules that take seconds to import are imported by the functions that need them.

# Options for settings of `config.data`; the file in configs/ that fits the policy gives defaults.
_DATA = "max_episodes layout image_key wrist_key action_key language vocabulary".split()
Window = Mapping[str, np.ndarray]


def open_reader(policy, path: str, options: Mapping[str, object]):
    """Opens the data for a policy, with the wrist camera's future if the policy predicts it.

    Args:
      policy: the policy.
      path: of the data, or "embedded".
      options: fields of `config.data` that differ from the defaults.

    Raises:
      UserError: the data is missing or lacks what the policy reads.
    """
    from convert.describe import config_file
    from uva_jax.data import source
    from uva_jax.data.readers import open_reader as open_data
    from uva_jax.eval.recorded import spec_of

    module = config_file(policy.config).removesuffix(".py").replace("/", ".")
    config = importlib.import_module(module).get_config()
    data = dataclasses.replace(
        section(config.data, source.DataOptions), path=path, mirror="", **options
    )
    return open_data(data, policy, spec=spec_of(policy.config), progress=_rendering)


def _rendering(done: int, total: int) -> None:
    ends = "\n" if done == total else ""
    print(f"\rrendering: {done} of {total} frames", end=ends, file=sys.stderr, flush=True)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each setting of `config.data` that says how data are read."""
    for name in _DATA:
        spec = specs()[f"data.{name}"]
        text = f"{spec.rule.comment} (default: as in configs/)"
        parser.add_argument(f"--{name.replace('_', '-')}", type=spec.kind, help=text)


def given_data_options(args: argparse.Namespace) -> dict[str, object]:
    """Returns the options of `add_data_options` that were given."""
    return {name: getattr(args, name) for name in _DATA if getattr(args, name) is not None}


def choose(reader, episode: int | None, step: int | None, count: int, seed: int):
    """Chooses windows.

    Without an episode they are held-out windows in a seeded order; without a step they are spread
    over the episode; otherwise they follow each other from `step`, one horizon of actions apart.

    Returns:
      arrays (count,) of episodes and of current steps within them.

    Raises:
      UserError: there is no such episode or step.
    """
    from uva_jax.eval.recorded import held_out

    buffer, options = reader.buffer, reader.options
    if count < 1:
        raise UserError(f"--windows is {count}, but should be at least 1")
    if episode is None:
        if step is not None:
            raise UserError(f"--step {step} is a step of an episode: give --episode too")
        return held_out(reader, count, seed, "; or say with --episode whose windows")
    if not 0 <= episode < buffer.n_episodes:
        raise UserError(
            f"--episode is {episode}, but {buffer.path} has episodes 0 to {buffer.n_episodes - 1}"
        )
    length = int(np.diff(buffer.episode_ends, prepend=0)[episode])
    last = length - (options.horizon // 2 + 1 - options.pad_after)
    if last < 0:
        raise UserError(
            f"episode {episode} has {length} steps, too few for a window: choose another --episode"
        )
    if step is None:
        steps = np.linspace(0, last, count + 2)[1:-1].astype(int)
    else:
        steps = step + reader.spec.n_actions * reader.downsample * np.arange(count)
    if steps[0] < 0 or steps[-1] > last:
        raise UserError(
            f"windows of episode {episode} can begin at steps 0 to {last}, but {count} from --step "
            f"{step} on reach from {steps[0]} to {steps[-1]}"
        )
    return np.full(count, episode), steps


def read_observation(path: str) -> Window:
    """Reads the arrays of an .npz.

    Raises:
      UserError: the file is missing or cannot be read.
    """
    if not Path(path).is_file():
        raise UserError(f"--obs is {path}, but there is no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--obs {path} cannot be read ({error}): it should be an .npz of plain arrays"
        ) from error


def check_out(out: str | None, mode: str, with_video: bool) -> Path | None:
    """Checks --out and makes its folder before any work is done; returns its path.

    Raises:
      UserError: the suffix is unknown, or the file cannot be written.
    """
    from uva_jax.eval import film

    if out is None:
        return None
    path = Path(out).expanduser()
    suffix = path.suffix.lower()
    if suffix not in film.SUFFIXES:
        raise UserError(f"--out is {out}; its name should end in {', '.join(film.SUFFIXES)}")
    if suffix != ".npz" and not with_video:
        raise UserError(
            f"{mode} predicts actions and no video: give --out a name that ends in .npz, or leave "
            "it out"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(
            f"--out {out} cannot be written: it is a folder, or its folder is not writable"
        )
    return path


def lines(name: str, figures: Mapping) -> list[str]:
    """Returns the table's rows for one window, one per camera; see `predict.figures`."""
    error = f"{figures['action_mse']:10.5f}" if "action_mse" in figures else ""
    rows = []
    for camera, found in figures["cameras"].items():
        cells = ""
        for kind in ("predicted", "last_frame", "reconstruction"):
            some = found.get(kind)
            cells += f"{some['psnr']:8.2f} {some['ssim']:6.3f}  " if some else " " * 17
        rows.append(f"{name:<20} {camera:<6}{cells}{error}")
    return rows or ([f"{name:<20}       {error}"] if error else [])


def header(figures: Mapping) -> list[str]:
    """Returns the table's header."""
    titles = ("predicted", "last frame", "VAE of truth") if figures["cameras"] else ()
    above = "".join(f"{title:>15}  " for title in titles)
    below = f"{'    PSNR   SSIM  ' * len(titles)}"
    error = "action MSE" if "action_mse" in figures else ""
    if not (titles or error):
        return []
    columns = f"{'window':<20} {'camera' if titles else '':<6}{below}{error}"
    return [f"{'':27}{above}".rstrip(), columns.rstrip()] if titles else [columns]


def run(args: argparse.Namespace) -> None:
    """Samples windows, prints the table and writes the files.

    Raises:
      UserError: an option is wrong or does not fit the policy or the data.
    """
    from uva_jax.eval import film, predict
    from uva_jax.eval.recorded import read_windows
    from uva_jax.models.losses import VIDEO_MODES
    from uva_jax.pipeline.inputs import any_policy
    from uva_jax.storage.atomic import write_json

    if (args.dataset is None) == (args.obs is None):
        raise UserError(
            "say what to sample from: either --dataset PATH (or embedded) or --obs FILE"
        )
    json_path = Path(args.json).expanduser() if args.json else None
    if json_path and (json_path.is_dir() or not json_path.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json} is a folder, or its folder does not exist")
    policy = any_policy(args.policy, args.weights)
    config = policy.config

    def default(value, own):
        return own if value is None else value

    sampling = predict.Sampling(
        mode=args.mode,
        num_iter=default(args.num_iter, config.num_iter),
        guidance=default(args.guidance, config.cfg),
        schedule=default(args.schedule, config.cfg_schedule),
        temperature=default(args.temperature, config.temperature),
        sampling_steps=args.sampling_steps,
        sampler=args.sampler,
        seed=args.seed,
    )
    predictor = predict.make_predictor(policy, sampling)
    out = check_out(args.out, args.mode, args.mode in VIDEO_MODES)
    if args.obs is not None:
        windows, names = [read_observation(args.obs)], [Path(args.obs).name]
    else:
        reader = open_reader(policy, args.dataset, given_data_options(args))
        for note in reader.buffer.notes:
            print(note)
        chosen = choose(reader, args.episode, args.step, args.windows, args.seed)
        windows = read_windows(reader, *chosen)
        names = [f"ep. {e}, step {s}" for e, s in zip(*chosen, strict=True)]
    if args.obs and not (out or {"action", "future_image"} & windows[0].keys()):
        raise UserError(
            f"{args.obs} holds no future to compare with: give --out to write the prediction"
        )
    windows = [
        predict.checked_window(config, args.mode, w, args.obs or args.dataset) for w in windows
    ]
    if sampling.mode not in config.task_modes:
        print(f"note: this policy was not trained in {sampling.mode}")
    loops = f"{sampling.sampling_steps} sampling steps" if sampling.sampling_steps else "own steps"
    print(
        f"{sampling.mode}: {sampling.num_iter} round(s), guidance {sampling.guidance:g} "
        f"({sampling.schedule}), temperature {sampling.temperature:g}, {loops} "
        f"({sampling.sampler}), seed {args.seed}"
    )
    predictions, rows = [], []
    for number, (window, name) in enumerate(zip(windows, names, strict=True)):
        predictions.append(predictor(window, number))
        rows.append(predict.figures(predictions[-1:]))
        for line in header(rows[-1]) * (not number) + lines(name, rows[-1]):
            print(line, flush=True)
    whole = predict.figures(predictions)
    if len(rows) > 1:
        print("\n".join(lines(f"all {len(rows)}", whole)))
    elif not lines("", whole):
        print(f"{names[0]} holds no future to compare with")
    if note := predict.divergence(whole.get("latent_spread")):
        print(f"note: {note}")
    if out is not None:
        film.write(out, predictions, names)
        print(f"wrote {out}")
    if json_path is not None:
        found = {
            "policy": args.policy,
            "data": args.obs or args.dataset,
            "sampling": dataclasses.asdict(sampling),
            "windows": [{"window": name} | row for name, row in zip(names, rows, strict=True)],
            "all": whole,
        }
        write_json(json_path, found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m uva_jax sample",
        description="Samples a policy's video and actions and compares them with the recording.",
    )
    add = parser.add_argument
    add("--policy", required=True, help="a policy folder, a UVA .ckpt, or 'embedded'")
    add("--weights", default="ema", help="weights of a .ckpt: ema or model (default: ema)")
    add("--dataset", help="diffusion-policy zarr (folder or .zip), or 'embedded'")
    add("--obs", metavar="FILE", help=".npz with an observation, in place of --dataset")
    add("--episode", type=int, help="episode of the windows (default: held-out episodes)")
    add("--step", type=int, help="current step of the first window (default: evenly spaced)")
    add("--windows", type=int, default=1, metavar="B", help="number of windows (default: 1)")
    add(
        "--mode",
        default="full_dynamic_model",
        help="full_dynamic_model (default), video_model, dynamic_model, policy_model or "
        "inverse_model",
    )
    add("--num-iter", type=int, metavar="N", help="token rounds (default: the policy's)")
    add("--guidance", type=float, metavar="G", help="scale, 1: none (default: the policy's)")
    add("--schedule", help="of guidance: linear or constant (default: the policy's)")
    add("--temperature", type=float, metavar="T", help="of sampling (default: the policy's)")
    add("--sampling-steps", type=int, default=0, metavar="S", help="default: the policy's")
    add("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help="of every loop")
    add("--seed", type=int, default=0, help="of all noise (default: 0)")
    add("--out", metavar="FILE", help="file to write: .mp4, .gif, .png (one image) or .npz")
    add("--json", metavar="FILE", help="write the table and the settings to FILE")
    add_data_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input prints one sentence on stderr and returns status 2."""
    quiet_libraries()
    args = _parser().parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
