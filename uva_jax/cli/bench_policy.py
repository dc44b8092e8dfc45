"""`bench policy`: times a policy's call, whole and by parts, here and in PyTorch.

The whole call is that of an actor (`models/policy_call.py`), from a window in the host's memory to
actions there; the frames before the last one were encoded when they were observed. PyTorch's call
is upstream's, which encodes all frames of the window, or one that has also encoded all but the last
frame before. The parts are separate programs, so they need not add up to the whole. "VAE" encodes
the last frame.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from uva_jax.cli import bench_turns
from uva_jax.cli.bench_models import HEADS, policy_config, random_frames, random_policy
from uva_jax.cli.bench_turns import COMPILED, OURS, TORCH, Row, Work
from uva_jax.models.policy_call import ahead_steps, new_frames
from uva_jax.models.policy_config import PolicyConfig, steps_of
from uva_jax.runtime.respacing import TRAIN_STEPS, space_timesteps

CALL, UPSTREAM = "call", "call, all frames"


def windows(config: PolicyConfig, batch: int) -> Callable[[], np.ndarray]:
    """Returns a function that gives the next window of frames (batch, n_frames, h, w, 3) uint8.

    A window has `new_frames` new ones and otherwise the last ones of the window before.
    """
    total, fresh = config.mar.n_frames, new_frames(config)
    frames, start = random_frames(batch, total + fresh), 0

    def following():
        nonlocal start
        picks = (start + np.arange(total)) % frames.shape[1]
        start += fresh
        return frames[:, picks]

    return following


def build(backend: str, *, head: str, size: str, dtype: str, batch: int, sampling_steps: str):
    """Returns the call and its parts; see `bench_turns.measure`."""
    config = policy_config(size, head)
    steps = (
        "1"
        if head == "shortened graft"
        else steps_of(config.action_head, str(sampling_steps or ""))
    )
    if backend == OURS:
        return _ours(config, dtype, batch, steps)
    from convert.torch import acting

    fresh, ahead = new_frames(config), len(ahead_steps(config))
    found = acting.parts(
        config, dtype, batch, steps, fresh, ahead, windows(config, batch), backend == COMPILED
    )
    return {name: Work(*part) for name, part in found.items()}


def _ours(config: PolicyConfig, dtype: str, batch: int, steps: str) -> dict[str, Work]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from uva_jax.cli.flops import flops
    from uva_jax.models.policy_call import PolicyCall

    policy = random_policy(config, dtype)
    graph, state = nnx.split(policy)
    variables, tree = jax.tree.flatten(state)  # as in the call, because jax.jit is slow on a State
    call, following = PolicyCall(policy, steps, encodes_ahead=True), windows(config, batch)
    fresh, ahead = new_frames(config), len(ahead_steps(config))
    window, numbers, count = following(), np.arange(batch, dtype=np.int32), 0

    def before():
        nonlocal window
        window = following()
        for number in range(-fresh, ahead - fresh):
            jax.block_until_ready(call.encode_ahead({"image": window[:, number]}))

    def whole():
        nonlocal count
        actions = call({"image": window}, numbers, count)
        count += 1
        return actions

    whole()

    functions = {
        "resize": lambda policy, frames: policy.preprocess(frames),
        "VAE": lambda policy, frames: policy.vae.encode(frames),
        "transformer": lambda policy, latents: policy.video_tokens(latents),
        "condition": lambda policy, z: policy.action_head.condition(z),
        "loop": lambda policy, condition, noise: policy.action_head.sample_given(
            condition, noise=noise, temperature=config.temperature, sampling_steps=steps
        ),
    }
    jitted = {
        name: jax.jit(
            lambda variables, *args, of=function: of(
                nnx.merge(graph, jax.tree.unflatten(tree, variables)), *args
            )
        )
        for name, function in functions.items()
    }
    key, action_head = jax.random.key(0), config.action_head
    frames = jnp.asarray(random_frames(batch * (fresh - ahead)))
    latents = jax.random.normal(key, policy.latent_shape(batch))
    z = jitted["transformer"](variables, latents)
    draws = len(space_timesteps(TRAIN_STEPS, steps)) + 1
    noise = jax.random.normal(key, (draws, batch, action_head.n_actions, action_head.channels))
    arguments = {
        "resize": (frames,),
        "VAE": (jitted["resize"](variables, frames),),
        "transformer": (latents,),
        "condition": (z,),
        "loop": (jitted["condition"](variables, z), noise),
    }
    parts = {
        name: Work(
            lambda of=jitted[name], given=given: jax.block_until_ready(of(variables, *given)),
            flops(jitted[name], variables, *given),
        )
        for name, given in arguments.items()
    }
    total = sum(part.flops for part in parts.values())
    return {CALL: Work(whole, total, before=before)} | parts


def bench_policy(
    size: str, dtype: str, batch: int, sampling_steps: int | None, compiled: bool
) -> dict:
    """Measures the calls of teacher, graft and shortened graft.

    Args:
      size: of the policies, "tiny" or "pusht".
      dtype: of products, "float32" or "bfloat16".
      batch: observations of a call.
      sampling_steps: of teacher and graft; None: their own.
      compiled: also measure `torch.compile`.

    Returns:
      the result of `bench_turns.measure`, and the arguments.

    Raises:
      UserError: steps are too many, or a process failed.
    """
    steps = steps_of(policy_config(size, "teacher").action_head, str(sampling_steps or ""))
    space_timesteps(TRAIN_STEPS, steps)
    given = {"size": size, "dtype": dtype, "batch": batch, "sampling_steps": steps}
    backends = (OURS, *bench_turns.torch_backends(compiled))
    rows = [Row(head, backend, given | {"head": head}) for head in HEADS for backend in backends]
    return given | bench_turns.measure(__name__, rows)


def table(result: dict) -> str:
    """Formats the result of `bench_policy`; speeds are relative to PyTorch's teacher."""
    teacher = bench_turns.row_of(result, TORCH, HEADS[0])
    reference = {name: part["seconds"] for name, part in teacher["parts"].items()}
    # PyTorch's call as upstream's, which is what a user has.
    reference[CALL] = reference[UPSTREAM]
    return "\n".join(
        [
            f"{result['size']}: a call for {result['batch']} observation(s) in {result['dtype']}, "
            f"{result['sampling_steps']} sampling steps, shortened 1",
            *bench_turns.lines(result, reference),
            "speed: of PyTorch's teacher; of calls, against its call with all frames",
        ]
    )
