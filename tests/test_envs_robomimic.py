"""Libero's and robomimic's environments, with a stand-in for their packages."""

import json
import sys
import textwrap

import numpy as np
import pytest

from uva_jax.envs.robomimic import Libero, Robomimic
from uva_jax.envs.rotations import actions_from_10d, actions_to_10d
from uva_jax.envs.simulator import make_simulator
from uva_jax.envs.workers import WorkerProcess
from uva_jax.runtime.errors import UserError

# What robomimic's EnvRobosuite does: images as floats with channels first, rewards of 0 or 1.
STAND_IN = {
    "robomimic/utils/file_utils.py": """
        import json, pathlib
        def get_env_metadata_from_dataset(dataset_path):
            return json.loads(pathlib.Path(dataset_path).read_text())
    """,
    "robomimic/utils/obs_utils.py": """
        modalities = {}
        def initialize_obs_modality_mapping_from_dict(modality_mapping):
            modalities.update(modality_mapping)
    """,
    "robomimic/utils/env_utils.py": """
        import numpy as np
        from robomimic.utils.obs_utils import modalities
        made = []
        class Robosuite:
            hard_reset = True
        class Env:
            def __init__(self, meta):
                self.meta, self.env, self.actions = meta, Robosuite(), []
            def reset(self):
                assert not self.env.hard_reset
                self.value = int(np.random.randint(256))
                return self.look()
            def look(self):
                h, w = (self.meta["env_kwargs"][f"camera_{k}"] for k in ("heights", "widths"))
                image = np.zeros((3, h, w), np.float32)
                image[0, 0] = self.value / 255  # the first row is the top
                found = {key: image for key in modalities["rgb"]}
                widths = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
                return found | {k: np.full(n, 0.5) for k, n in widths.items()}
            def step(self, action):
                self.actions.append(np.array(action))
                self.value = 7
                return self.look(), float(len(self.actions) == 2), False, {}
        def create_env_from_metadata(env_meta, render, render_offscreen, use_image_obs):
            assert render_offscreen and use_image_obs and not render
            made.append(Env(env_meta))
            return made[-1]
    """,
    "libero/libero/__init__.py": """
        import pathlib
        def get_libero_path(name):
            assert name == "bddl_files"
            return str(pathlib.Path(__file__).parent / "bddl")
    """,
    "libero/libero/envs/__init__.py": "",
    "libero/libero/bddl/libero_10/put_it_there.bddl": "",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes the packages importable; returns robomimic's env_utils."""
    for name, text in STAND_IN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: sys.modules["robomimic.utils.env_utils"]
    for name in [n for n in sys.modules if n.split(".")[0] in ("robomimic", "libero")]:
        del sys.modules[name]


def describe(path, cameras, **more):
    """Writes a file that describes an environment as the demonstrations' does."""
    kwargs = {"camera_names": cameras, "camera_heights": 12, "camera_widths": 16}
    kwargs |= {"controller_configs": {"control_delta": True}, "robots": ["Panda"]}
    path.write_text(json.dumps({"env_kwargs": kwargs | more}))
    return path


def test_robomimic_follows_the_protocol_of_upstreams_runner(stand_in, tmp_path):
    file = describe(tmp_path / "image_abs.hdf5", ["sideview", "robot0_eye_in_hand"])
    simulator = Robomimic(str(file))
    assert simulator.observes["image"] == simulator.observes["wrist_image"] == (12, 16, 3)
    assert simulator.action_dim == 10 and simulator.tasks == ()
    simulator.reset(100_000)
    np.random.seed(100_000)
    first = np.random.randint(256)
    (env,) = stand_in().made
    assert env.meta["env_kwargs"]["controller_configs"] == {"control_delta": False}
    assert env.meta["env_kwargs"]["use_object_obs"] is False
    seen = simulator.observe(["image", "robot0_eef_quat"])
    assert seen["image"].dtype == np.uint8 and seen["image"].shape == (12, 16, 3)
    assert (seen["image"][0, :, 0] == first).all() and not seen["image"][1:].any()
    assert seen["robot0_eef_quat"].dtype == np.float32
    action = np.array([0.1, 0.2, 0.3, 0.4, -0.5, 0.6, -1.0])
    assert simulator.step(actions_to_10d(action)) == (0.0, False)
    np.testing.assert_allclose(env.actions[0], action, atol=1e-6)  # the gripper keeps its sign
    assert simulator.step(actions_to_10d(action)) == (1.0, True)


def test_rotations_of_both_arms_are_converted_back():
    actions = np.random.default_rng(0).normal(0, 0.7, (5, 2, 7))
    both = actions_to_10d(actions).reshape(5, 20)
    np.testing.assert_allclose(actions_from_10d(both), actions.reshape(5, 14), atol=1e-5)


def test_libero_divides_seeds_over_its_tasks(stand_in, tmp_path):
    folder = tmp_path / "libero_10"
    folder.mkdir()
    for task in ("PUT_it_there", "open_the_drawer"):
        told = {"bddl_file_name": "chiliocosm/bddl_files/libero_10/put_it_there.bddl"}
        describe(folder / f"{task}_demo.hdf5", ["agentview"], **told)
    simulator = Libero(str(folder))
    assert simulator.tasks == ("PUT it there", "open the drawer")
    assert "wrist_image" not in simulator.observes
    for seed, (task, own) in {0: (0, 0), 7: (1, 3), 8: (0, 4)}.items():
        simulator.reset(seed)
        np.random.seed(own)
        assert simulator.task == task
        assert simulator.observe(["image"])["image"][0, 0, 0] == np.random.randint(256)
    bddl = stand_in().made[-1].meta["env_kwargs"]["bddl_file_name"]
    assert bddl == str(tmp_path / "libero/libero/bddl/libero_10/put_it_there.bddl")
    assert len(stand_in().made) == 3  # one at the start and one for every change of the task


def test_a_worker_runs_them_too(stand_in, tmp_path):
    file = describe(tmp_path / "image_abs.hdf5", ["agentview"])
    worker = WorkerProcess("uva_jax.envs.episode:EpisodeWorker", "robomimic", str(file))
    worker.send("describe")
    assert worker.receive().observes["image"] == (12, 16, 3)
    worker.close()


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("robomimic", "", "simulator_files is '', but should be the HDF5 file of the task's demon"),
        ("libero", "nowhere", "should be the folder of Libero's files <task>_demo.hdf5"),
    ],
)
def test_missing_files_are_explained(name, files, message):
    with pytest.raises(UserError, match=message):
        make_simulator(name, files)


def test_a_missing_package_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "robomimic", None)
    with pytest.raises(UserError, match="needs the package robomimic"):
        Robomimic(str(describe(tmp_path / "image_abs.hdf5", ["agentview"])))
