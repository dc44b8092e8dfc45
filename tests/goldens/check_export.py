"""Runs exported grafts in the original's own code and compares their samples with Flax.

    python tests/goldens/check_export.py UPSTREAM [--python PYTHON] [--tasks TASK ...]

UPSTREAM is a checkout of github.com/ShuangLI59/unified_video_action, PYTHON the interpreter of an
environment that runs it (by default this one; `original_uva.py` lists its imports). For each task
the original makes a random policy of reduced size and saves it; this script converts it, grafts it
with random values, exports it and samples; the original loads the export with its own workspace and
`grafted_head.py` as action head, and samples with the same noise. The script prints the errors
relative to the largest value; the exit status is 1 if one exceeds 5e-4, the bound for sampling.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from einops import rearrange

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from convert.checks.golden import SAMPLED  # noqa: E402
from convert.from_torch import from_torch  # noqa: E402
from convert.to_torch import export_policy  # noqa: E402
from uva_jax.graft.assemble import HeadOptions, assemble, grafted_config, start_head  # noqa: E402
from uva_jax.models import diffusion, mar, policy_folder, surgery  # noqa: E402
from uva_jax.models.token_sampler import masked_counts, sample_tokens  # noqa: E402

TASKS = ("pusht", "libero10", "umi_multi", "toolhang")
# One block of the default operators, one of their alternatives, one that stays the teacher's.
OPERATORS = (
    "cross_attn,self_attn,mlp",
    "pooled_cross_attn,windowed_self_attn,swiglu",
    "keep",
)
BATCH, MODES = 2, {"policy_model": 1, "full_dynamic_model": 2}  # mode -> rounds
STATES = {  # in the order in which the original joins them
    "robot0_eef_pos": 3,
    "robot0_eef_rot_axis_angle": 6,
    "robot0_eef_quat": 4,
    "robot0_gripper_qpos": 2,
    "robot0_gripper_width": 1,
    "robot0_eef_rot_axis_angle_wrt_start": 6,
}


def graft(checkpoint: Path, folder: Path):
    """Grafts the checkpoint's policy and exports it as folder/grafted.ckpt.

    Every value of the grafted head is changed slightly, so that all of them matter.
    """
    from_torch(checkpoint, folder / "teacher")
    teacher = policy_folder.load_policy(folder / "teacher")
    config = grafted_config(teacher, HeadOptions(operators=OPERATORS))
    head, random = start_head(teacher.action_head, config, "preserve", 0), np.random.default_rng(1)
    arrays = {
        path: x + 0.03 * random.standard_normal(x.shape, dtype=np.float32)
        for path, x in surgery.flatten(head).items()
    }
    policy = assemble(teacher, surgery.replace(head, arrays))
    records = policy_folder.read_records(folder / "teacher")
    export_policy(policy, folder / "grafted.ckpt", records=records, base=checkpoint)
    return policy


def inputs(policy) -> tuple[dict, dict, dict[str, list]]:
    """Returns the original's inputs, the same for Flax, and the noise of each mode's loops."""
    c, random = policy.config.mar, np.random.default_rng(2)

    def normal(*shape):
        return random.standard_normal(shape, dtype=np.float32)

    maps = (BATCH, c.n_frames, policy.config.vae.z_channels, *c.grid)
    given, streams = {"cond": normal(*maps)}, {}
    if c.text_dim:
        given["text_latents"] = streams["text_latents"] = normal(BATCH, c.text_dim)
    if c.history_action:
        past = normal(BATCH, c.n_actions, c.action_dim)
        given["history_nactions"] = streams["history_nactions"] = past
    if c.proprio_dim:
        states = {k: normal(BATCH, c.proprio_steps, STATES[k]) for k in policy.config.proprio_keys}
        streams["proprio"] = np.concatenate(list(states.values()), axis=-1)
        given |= {f"state/{k}": v for k, v in states.items()}
    if c.proprio_image:
        wrist = given["state/second_image_z"] = normal(*maps)
        streams["proprio_tokens"] = np.asarray(mar.patchify(nhwc(wrist), policy.config.patch_size))
    given["orders"] = np.stack([random.permutation(c.tokens_per_frame) for _ in range(BATCH)])
    given["temperature"] = np.float32(policy.config.temperature)

    def loop(head, rows):
        steps = len(diffusion.make_schedule(head.config.sampling_steps, 1000))
        return normal(steps + 1, BATCH, rows, head.config.channels)

    loops = {}
    for mode, rounds in MODES.items():
        counts, loops[mode] = masked_counts(c.tokens_per_frame, rounds), []
        for masked, left in zip(counts[:-1], counts[1:], strict=True):
            loops[mode].append(loop(policy.action_head, c.n_actions))
            for head in (policy.video_head, policy.wrist_head):
                if mode != "policy_model" and head is not None:
                    loops[mode].append(loop(head, c.n_frames * (masked - left)))
        given[f"loops/{mode}"] = len(loops[mode])
        given |= {f"noise/{mode}/{i}": noise for i, noise in enumerate(loops[mode])}
    return given, streams, loops


def nhwc(maps):
    return rearrange(maps, "b t c h w -> b t h w c")


def sample(policy, given, streams, loops) -> dict[str, np.ndarray]:
    """Returns the samples of Flax, by mode and name, in the original's layout."""
    found = {}
    for mode, rounds in MODES.items():

        @jax.jit
        def run(policy, cond, noises, streams, mode=mode, rounds=rounds):
            return sample_tokens(
                policy,
                cond,
                task_mode=mode,
                num_iter=rounds,
                temperature=policy.config.temperature,
                orders=given["orders"],
                noises=noises,
                streams=streams,
            )

        for name, value in run(policy, nhwc(given["cond"]), loops[mode], streams).items():
            if name != "actions":
                value = rearrange(value, "b t h w c -> (b t) c h w")
            found[f"{mode}/{name}"] = np.asarray(value)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("upstream", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    args = parser.parse_args()
    worst = 0.0
    for task in args.tasks:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)

            def original(*command, task=task):
                script = [args.python, str(HERE / "original_uva.py"), str(args.upstream.resolve())]
                done = subprocess.run([*script, *command], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{task}: the original failed:\n{done.stdout}{done.stderr}")

            original("make", task, str(folder / "original.ckpt"))
            policy = graft(folder / "original.ckpt", folder)
            given, streams, loops = inputs(policy)
            np.savez(folder / "given.npz", **given)
            with jax.default_matmul_precision("highest"):
                wanted = sample(policy, given, streams, loops)
            original("sample", task, str(folder))
            with np.load(folder / "found.npz") as found:
                assert set(found) == set(wanted), (set(found), set(wanted))
                for key, want in wanted.items():
                    error = float(np.abs(found[key] - want).max() / np.abs(want).max())
                    worst = max(worst, error)
                    print(f"{task:<10} {key:<34} {str(want.shape):<20} {error:.1e}", flush=True)
    return int(not worst <= SAMPLED)


if __name__ == "__main__":
    sys.exit(main())
