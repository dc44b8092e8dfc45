"""Robomimic's and Libero's environments as simulators, by the protocol of UVA's runners.

The environment is the one that the demonstrations' HDF5 file describes, with its cameras and their
size. Actions are absolute, and their rotations become rotation vectors; the gripper's sign is that
of the recording. Images come upright from robomimic, as the importers store them. The packages are
those of the user's machine; tests replace them by a stand-in with the same interface.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from uva_jax.envs.rotations import actions_from_10d
from uva_jax.runtime.errors import UserError

_HAND = "robot0_eye_in_hand"
_STATES = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
_WIDTHS = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
_LIBERO_FILE = "_demo.hdf5"


def _module(name: str) -> Any:
    """Imports a module of the environment's packages."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(
            f"this simulator needs the package {package} ({error}): install it as UVA's "
            "instructions say, or set config.evaluate.simulator=''"
        ) from error


class Robomimic:
    """The environment of one of robomimic's HDF5 files.

    The main camera is the first that is not on the hand. Rewards are 1 for a solved task.
    """

    def __init__(self, files: str = ""):
        """Makes the environment.

        Args:
          files: the HDF5 file, such as tool_hang/ph/image_abs.hdf5.

        Raises:
          UserError: there is no such file, or a package is missing.
        """
        self._files = self._paths(files)
        self.tasks = self._sentences()
        self.task, self._made = 0, -1
        self._make(0)

    def reset(self, seed: int) -> None:
        """Starts the episode of a seed: robosuite draws it from NumPy's global generator."""
        self.task, own = self._episode(seed)
        self._make(self.task)
        np.random.seed(own)
        self._seen = self._env.reset()

    def observe(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Returns pictures uint8 (h, w, 3) and states float32 (k,) of the current step."""
        found = {}
        for name in names:
            camera = self._cameras.get(name)
            if camera is None:
                found[name] = np.asarray(self._seen[name], np.float32)
            else:
                found[name] = _picture(self._seen[f"{camera}_image"])
        return found

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Executes an absolute action: position, `rotation_6d` and gripper of each arm."""
        self._seen, reward, _, _ = self._env.step(actions_from_10d(action))
        return float(np.clip(reward, 0.0, 1.0)), reward >= 1

    def _paths(self, files: str) -> list[Path]:
        path = Path(files).expanduser()
        if not files or not path.is_file():
            raise UserError(
                f"config.evaluate.simulator_files is {files!r}, but should be the HDF5 file of the "
                "task's demonstrations, which describes its environment"
            )
        return [path]

    def _sentences(self) -> tuple[str, ...]:
        return ()

    def _episode(self, seed: int) -> tuple[int, int]:
        """Returns the task and the environment's own seed."""
        return 0, seed

    def _prepare(self, meta: dict) -> None:
        """Changes the description of the environment."""
        meta["env_kwargs"]["use_object_obs"] = False

    def _make(self, task: int) -> None:
        """Makes the environment of a task, unless it is the current one."""
        if self._made == task:
            return
        file_utils, env_utils, obs_utils = (
            _module(f"robomimic.utils.{name}") for name in ("file_utils", "env_utils", "obs_utils")
        )
        meta = file_utils.get_env_metadata_from_dataset(str(self._files[task]))
        kwargs = meta["env_kwargs"]
        kwargs["controller_configs"]["control_delta"] = False  # absolute targets
        cameras = list(kwargs["camera_names"])
        main = [name for name in cameras if name != _HAND]
        if not main:
            raise UserError(f"{self._files[task]} describes no camera beside {_HAND}")
        self._cameras = {"image": main[0]} | ({"wrist_image": _HAND} if _HAND in cameras else {})
        obs_utils.initialize_obs_modality_mapping_from_dict(
            {"rgb": [f"{c}_image" for c in self._cameras.values()], "low_dim": list(_STATES)}
        )
        self._prepare(meta)
        self._env = env_utils.create_env_from_metadata(
            env_meta=meta, render=False, render_offscreen=True, use_image_obs=True
        )
        self._env.env.hard_reset = False  # which takes ever more memory
        size = kwargs["camera_heights"], kwargs["camera_widths"]
        self.observes = {name: (*size, 3) for name in self._cameras} | {
            name: (width,) for name, width in _WIDTHS.items()
        }
        robots = kwargs.get("robots", "Panda")
        self.action_dim = 10 * (1 if isinstance(robots, str) else len(robots))
        self._made = task


class Libero(Robomimic):
    """The tasks of a folder of Libero's HDF5 files, in the order of their names.

    With n tasks, seed s is the environment's seed s // n of task s % n. Upstream's test episodes of
    the ten tasks of Libero10 are the seeds 1000000 to 1000029.
    """

    def _paths(self, files: str) -> list[Path]:
        paths = sorted(Path(files).expanduser().glob(f"*{_LIBERO_FILE}")) if files else []
        if not paths:
            raise UserError(
                f"config.evaluate.simulator_files is {files!r}, but should be the folder of "
                f"Libero's files <task>{_LIBERO_FILE}, which describe the environments"
            )
        return paths

    def _sentences(self) -> tuple[str, ...]:
        return tuple(p.name.removesuffix(_LIBERO_FILE).replace("_", " ") for p in self._files)

    def _episode(self, seed: int) -> tuple[int, int]:
        own, task = divmod(seed, len(self._files))
        return task, own

    def _prepare(self, meta: dict) -> None:
        """Replaces the path of the task's BDDL file, which is that of the recording's machine."""
        libero = _module("libero.libero")
        _module("libero.libero.envs")  # registers the environments
        told = Path(meta.get("bddl_file") or meta["env_kwargs"]["bddl_file_name"])
        folder = Path(libero.get_libero_path("bddl_files"))
        found = sorted(folder.glob(f"**/{told.name}"))
        if not found:
            raise UserError(f"{folder} holds no {told.name}: install Libero with its BDDL files")
        meta["bddl_file"] = meta["env_kwargs"]["bddl_file_name"] = str(found[0])


def _picture(image: np.ndarray) -> np.ndarray:
    """Returns robomimic's image, float (3, h, w) in [0, 1], as uint8 (h, w, 3)."""
    image = np.asarray(image)
    if image.dtype == np.uint8:
        return image
    return np.rint(np.moveaxis(image, 0, -1) * 255).astype(np.uint8)
