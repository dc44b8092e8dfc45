"""The Fréchet video distance of policies' predictions, of held frames, and of the VAE.

`measure` passes each video through I3D and keeps its features, with squared error and SSIM;
`figures` makes distances of them; `judge` does both for several policies, and measures only once
what depends on nothing but the recording and the VAE. A video is the four frames of the future,
each repeated to make sixteen, as in upstream's `test_video_fvd`; frames are rounded to whole
numbers, where upstream truncates them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import numpy as np

from uva_jax.data.source import WindowReader
from uva_jax.eval.cameras import make_reconstructor
from uva_jax.eval.frechet import frechet_distance, unlimited
from uva_jax.eval.predict import Sampling, checked_window, divergence, make_predictor
from uva_jax.eval.recorded import Window, held_out, read_windows
from uva_jax.eval.video import ssim
from uva_jax.models import i3d, surgery
from uva_jax.models.policy import Policy
from uva_jax.runtime.errors import UserError
from uva_jax.storage.atomic import new_file
from uva_jax.storage.identity import hash_arrays, hash_json

LIMIT = 16  # videos of upstream's protocol
LEAST = 16  # videos of any distance
MODE = "full_dynamic_model"  # upstream's
_TRUTH = "future"
_PART = 8  # windows of a stored part


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """How policies' videos are judged.

    Attributes:
      videos: number of held-out windows.
      sampling_steps: of the video's diffusion, 1..1000; 0: each policy's own number.
      sampler: of the diffusion; see `diffusion.sample_loop`.
      seed: of the windows' order and all noise.
    """

    videos: int
    sampling_steps: int = 0
    sampler: str = "ancestral"
    seed: int = 0


def judge(
    policies: Mapping[str, Policy],
    reader_of: Callable[[Policy], WindowReader],
    network: i3d.I3D,
    options: VideoOptions,
    *,
    folder: Path,
    origin: Mapping[str, str],
    say: Callable[[str], None],
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> dict[str, dict]:
    """Measures the videos of policies; those with equal trunks are predicted once.

    The recorded videos and their reconstructions are measured once for all policies that read the
    same windows and have equal VAEs.

    Args:
      policies: by name.
      reader_of: opens the recording for a policy, with every camera whose future it predicts.
      network: of the features.
      options: see `VideoOptions`.
      folder: of what is measured; a killed run resumes.
      origin: what the results depend on besides policies and options.
      say: takes messages.
      progress: opens, for the name of what is measured, the `progress` of `measure`.

    Returns:
      for each policy {"cameras": see `figures`, "windows": their number, "sampling": its options,
      "trunk": a hash}, and "same_as": the policy with an equal trunk, if there is one before it.

    Raises:
      UserError: there are too few windows, or a policy predicts no video.
    """
    results: dict[str, dict] = {}
    recorded: dict[Path, dict] = {}  # what is measured of recordings, by its folder
    for name, policy in policies.items():
        trunk = trunk_hash(policy)
        twin = next((n for n, found in results.items() if found["trunk"] == trunk), None)
        if twin is not None:
            say(f"{name}: its trunk equals that of {twin}, and so do its videos")
            results[name] = results[twin] | {"same_as": twin}
            continue
        config = policy.config
        sampling = Sampling(
            mode=MODE,
            num_iter=config.num_iter,
            guidance=config.cfg,
            schedule=config.cfg_schedule,
            temperature=config.temperature,
            sampling_steps=options.sampling_steps,
            sampler=options.sampler,
            seed=options.seed,
        )
        predictor = make_predictor(policy, sampling, reconstruct=False)
        reader = reader_of(policy)
        episode, step = held_out(reader, options.videos, options.seed)
        if len(episode) < options.videos:
            say(f"the recording has {len(episode)} held-out windows, not {options.videos}")
        made_with = {**origin, "trunk": trunk, "sampling": dataclasses.asdict(sampling)}
        own = folder / hash_json(made_with)[:16]
        read_with = {**origin, "windows": windows_hash(policy, reader), "seed": options.seed}
        shared = folder / hash_json(read_with)[:16]

        def read(numbers, config=config, reader=reader, episode=episode, step=step):
            return [
                checked_window(config, MODE, window, reader.options.path)
                for window in read_windows(reader, episode[numbers], step[numbers])
            ]

        if shared not in recorded:
            of_recording = functools.partial(_of_recording, make_reconstructor(policy), network)
            with progress("the recording") as show:
                recorded[shared] = measure(of_recording, read, len(episode), shared, show)
        of_prediction = functools.partial(_of_prediction, predictor, network)
        with progress(name) as show:
            measured = measure(of_prediction, read, len(episode), own, show) | recorded[shared]
        results[name] = {
            "windows": len(episode),
            "sampling": dataclasses.asdict(sampling),
            "trunk": trunk,
            "cameras": figures(measured, episode, options.seed),
        }
        for kinds in results[name]["cameras"].values():
            if note := divergence(kinds["predicted"]["latent_spread"]):
                say(f"{name}: {note}")
    return results


def trunk_hash(policy: Policy) -> str:
    """Returns a hash of all that a policy's videos depend on: everything but its action head."""
    config = dataclasses.replace(policy.config, action_head=None)
    acts = policy.action_head is not None  # its draws come first
    arrays = surgery.flatten(policy)
    trunk = {path: x for path, x in arrays.items() if not path.startswith("action_head/")}
    return hash_json([dataclasses.asdict(config), acts, hash_arrays(trunk)])


def windows_hash(policy: Policy, reader: WindowReader) -> str:
    """Returns a hash of what the frames of windows and their reconstructions depend on."""
    config = policy.config
    frames = [dataclasses.asdict(config.vae), config.image_size, config.mar.wrist]
    read = [reader.spec.without_widths(), reader.options]
    vae = hash_arrays(surgery.flatten(policy.vae))
    return hash_json([*frames, *map(dataclasses.asdict, read), vae])


def measure(
    measured: Callable[[Window, int], Mapping[str, np.ndarray]],
    read: Callable[[np.ndarray], Sequence[Window]],
    count: int,
    folder: Path,
    progress: Callable[[int, int], None],
) -> dict[str, np.ndarray]:
    """Measures windows; stored in parts, so that a killed run resumes.

    Args:
      measured: returns the figures of a window and its number, by name.
      read: returns the windows of given numbers.
      count: number of windows, at least `LEAST`.
      folder: of the parts; it belongs to these windows and this function.
      progress: is called with the number of finished windows and `count`.

    Returns:
      (count, ...) by name.

    Raises:
      UserError: there are too few windows.
    """
    if count < LEAST:
        raise UserError(
            f"the Fréchet video distance needs at least {LEAST} windows, but there are {count}: "
            "hold out more episodes"
        )
    parts = []
    for start in range(0, count, _PART):
        numbers = np.arange(start, min(start + _PART, count))
        path = folder / f"windows_{start:05d}.npz"
        if (part := _stored(path, len(numbers))) is None:
            rows = [
                measured(window, int(number))
                for window, number in zip(read(numbers), numbers, strict=True)
            ]
            part = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            with new_file(path) as temporary:
                np.savez(temporary, **part)
        parts.append(part)
        progress(int(numbers[-1]) + 1, count)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _stored(path: Path, count: int) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        part = dict(file)
    # The last part is shorter than a full one if fewer windows were asked for.
    return part if all(len(values) == count for values in part.values()) else None


@jax.jit
def _logits(network: i3d.I3D, video: jax.Array) -> jax.Array:
    return network(i3d.preprocess(video[None]))[0]


def _features(network: i3d.I3D, frames: np.ndarray) -> np.ndarray:
    """Returns the features (400,) of a video (t, h, w, 3) of 4 or 16 frames, 0..255."""
    video = np.repeat(frames, 4, axis=0) if len(frames) < i3d.FRAMES else frames
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(network, video))


def _of_recording(reconstruct, network: i3d.I3D, window: Window, number: int) -> dict:
    """Returns the figures of the real frames and of all that is made of them; see `figures`."""
    del number
    found = {}
    for name, camera in reconstruct(window).items():
        found[f"{name}/{_TRUTH}/features"] = _features(network, camera.future)
        if camera.history is not None:
            held = np.broadcast_to(camera.history[-1:], camera.future.shape)
            found |= _compared(f"{name}/last_frame", held, camera.future, network)
        again = camera.reconstruction
        found |= _compared(f"{name}/reconstruction", again, camera.future, network)
    return found


def _of_prediction(predictor, network: i3d.I3D, window: Window, number: int) -> dict:
    """Returns the figures of the predicted frames; see `figures`."""
    found, prediction = {}, predictor(window, number)
    for name, camera in prediction.cameras.items():
        found |= _compared(f"{name}/predicted", camera.predicted, camera.future, network)
        found[f"{name}/predicted/latent_spread"] = np.float64(prediction.latent_spread)
    return found


def _compared(name: str, frames: np.ndarray, truth: np.ndarray, network: i3d.I3D) -> dict:
    error = frames.astype(np.float64) - truth
    return {
        f"{name}/features": _features(network, frames),
        f"{name}/squared_error": np.mean(error**2),
        f"{name}/ssim": np.mean(ssim(frames, truth)),
    }


def figures(measured: Mapping[str, np.ndarray], episode: np.ndarray, seed: int) -> dict:
    """Returns {camera: {kind: figures}} of what `measure` has found.

    The figures are "video_fvd", upstream's (of the first 16 videos; with 400 features their
    covariance has rank 15, so that it serves only to compare with upstream's figures), "fvd" of all
    videos, "fvd_unlimited", the same for unlimited data, with its "ci95" and what the bootstrap has
    "resampled", "psnr" (dB, of the mean squared error) and "ssim", and of what is predicted
    "latent_spread", the largest; see `Prediction`. "last_frame" repeats the last observed frame.

    Args:
      measured: by "camera/kind/figure": "features" (count, 400) float32; except for the kind
        "future" "squared_error" and "ssim" (count,); and "latent_spread" (count,) of the kind
        "predicted".
      episode: (count,) of each window.
      seed: of the extrapolation's subsets and of the bootstrap.
    """
    found: dict = {}
    for key in measured:
        camera, kind, figure = key.split("/")
        if figure != "features" or kind == _TRUTH:
            continue
        made, truth = measured[key], measured[f"{camera}/{_TRUTH}/features"]
        estimate = unlimited(made, truth, episode, seed=seed)
        error = np.mean(measured[f"{camera}/{kind}/squared_error"])
        found.setdefault(camera, {})[kind] = {
            "video_fvd": frechet_distance(made[:LIMIT], truth[:LIMIT]),
            "fvd": frechet_distance(made, truth),
            "fvd_unlimited": estimate.value,
            "ci95": [estimate.low, estimate.high],
            "resampled": "episodes" if estimate.grouped else "windows",
            "psnr": float(10 * np.log10(255.0**2 / max(error, 1e-10))),
            "ssim": float(np.mean(measured[f"{camera}/{kind}/ssim"])),
        }
        if (spread := measured.get(f"{camera}/{kind}/latent_spread")) is not None:
            found[camera][kind]["latent_spread"] = float(np.max(spread))
    return found
