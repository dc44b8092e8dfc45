"""Full size: graft a UVA policy of robomimic's tool hang (wrist camera, the robot's state).

    python -m uva_jax import --kind robomimic data/tool_hang/ph/image_abs.hdf5 \\
        --out data/tool_hang.zarr
    python -m uva_jax.main --config configs/toolhang.py --workdir runs/toolhang

The checkpoint says whether the policy takes the wrist camera, the state and past actions; other
arrays are not read. `--stage pretrain` trains such a policy on the same recording. Without
robomimic installed, the graft is evaluated by its actions on held-out windows; with it, set
`config.evaluate.simulator=robomimic`, `simulator_files` to the file of the demonstrations and
`max_steps=700`, as upstream.
"""

from configs import pusht


def get_config():
    config = pusht.get_config()
    config.teacher.checkpoint = "pretrained_models/toolhang.ckpt"
    config.data.path = "data/tool_hang.zarr"
    config.data.image_key = "sideview_image"
    config.data.wrist_key = "robot0_eye_in_hand_image"
    config.pretrain.model.update(
        task="toolhang",
        states=("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
        wrist=True,
    )
    config.evaluate.simulator = ""
    return config
