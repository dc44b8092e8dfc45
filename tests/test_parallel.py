"""Meshes, shardings and processes give the same numbers however the work is divided.

Simulated devices must be configured before jax starts, so such tests run functions of this file in
separate processes.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from uva_jax.models.losses import latent_loss
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import MARConfig, MLPHeadConfig, PolicyConfig, VAEConfig
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.parallel import (
    AXES,
    BATCH,
    DistributedOptions,
    barrier,
    batch_sharding,
    initialize_distributed,
    is_primary,
    make_mesh,
    replicated,
    shard_batch,
    sharded_map,
    shardings_for,
)
from uva_jax.train.trainable import partition

ROOT = Path(__file__).parents[1]


def start(function, *args, devices=1):
    """Starts `function` of this file in a fresh process with simulated devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # Optimising the programs would take longer than running them once.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, __file__, function.__name__, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process):
    """Returns the result of the function."""
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def tiny_policy():
    width = 16
    head = MLPHeadConfig(
        channels=2,
        z_channels=width,
        width=8,
        depth=1,
        aggregator="fc2",
        n_actions=4,
        n_frames=2,
        grid=(4, 4),
    )
    config = PolicyConfig(
        image_size=8,
        vae=VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_levels=(), z_channels=4),
        mar=MARConfig(
            encoder_embed_dim=width,
            encoder_depth=1,
            encoder_num_heads=2,
            decoder_embed_dim=width,
            decoder_depth=1,
            decoder_num_heads=2,
            n_frames=2,
            grid=(4, 4),
            token_dim=4,
            n_actions=4,
        ),
        action_head=head,
    )
    return nnx.split(nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0))))


def divide_the_work():
    """Computes loss and gradients of one batch on four meshes; runs on eight devices."""
    graph, abstract = tiny_policy()
    abstract, rest = partition(abstract, ["mar", "action_head"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), abstract)
    rest = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), rest)
    batch = {
        "cond": rng.normal(size=(8, 2, 4, 4, 4)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (8, 4, 2)).astype(np.float32),
    }

    def loss(params, batch):
        policy = nnx.merge(graph, params, rest)
        total, _ = latent_loss(
            policy,
            batch["cond"],
            batch["cond"],
            batch["actions"],
            task_mode="policy_model",
            key=jax.random.key(1),
            draws={"mask": jnp.ones((8, 2, 16))},
        )
        return total

    wanted, report = None, {}
    layouts = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (4, 2, 1), "tensor": (2, 2, 2)}
    for name, axes in layouts.items():
        mesh = make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
        where = shardings_for(abstract, mesh, min_size=64)
        placed = jax.device_put(params, where)
        step = jax.jit(
            jax.value_and_grad(loss),
            in_shardings=(where, batch_sharding(mesh)),
            out_shardings=(replicated(mesh), where),
        )
        value, gradient = step(placed, shard_batch(mesh, batch))
        found = [np.asarray(value), *map(np.asarray, jax.tree.leaves(gradient))]
        wanted = found if wanted is None else wanted
        report[name] = {
            "error": max(
                float(np.abs(f - w).max() / max(np.abs(w).max(), 1e-6))
                for f, w in zip(found, wanted, strict=True)
            ),
            "divided": {
                axis: sum(axis in leaf.sharding.spec for leaf in jax.tree.leaves(placed))
                for axis in AXES
            },
            "gradient": float(sum(np.abs(leaf).sum() for leaf in found[1:])),
        }
    report["shards"] = [
        str(len({str(s.index) for s in shard_batch(mesh, batch)["cond"].addressable_shards}))
        for mesh in (make_mesh(), make_mesh(fsdp=4), make_mesh(tensor=8))
    ]
    doubled = sharded_map(
        lambda scale, x: x * scale + jax.lax.axis_index("data") * 0,
        make_mesh(fsdp=2),
        in_specs=(P(), BATCH),
        out_specs=BATCH,
    )(2.0, batch["actions"])
    report["map"] = bool((np.asarray(doubled) == 2 * batch["actions"]).all())
    report["map_parts"] = len({str(s.index) for s in doubled.addressable_shards})
    return report


def meet(port, number):
    """Runs one of two processes: a sum over both, a barrier, and which is primary."""
    options = DistributedOptions(False, f"127.0.0.1:{port}", 2, int(number))
    joined = [initialize_distributed(options), initialize_distributed(options)]
    mesh = make_mesh()
    own = np.full((2, 3), float(number), np.float32)
    batch = shard_batch(mesh, {"x": own})
    total = jax.jit(lambda b: b["x"].sum(), out_shardings=replicated(mesh))(batch)
    barrier("summed")
    return [joined, is_primary(), float(total), list(batch["x"].shape), mesh.size]


@pytest.fixture(scope="module")
def eight():
    return answer(start(divide_the_work, devices=8))


@pytest.mark.parametrize("layout", ["data", "fsdp", "tensor"])
def test_loss_and_gradients_do_not_depend_on_the_mesh(eight, layout):
    assert eight["one"]["gradient"] > 1
    assert eight[layout]["error"] < 1e-5


def test_parameters_are_divided_where_the_mesh_says_so(eight):
    none = {"data": 0, "fsdp": 0, "tensor": 0}
    assert eight["one"]["divided"] == eight["data"]["divided"] == none
    assert eight["fsdp"]["divided"]["fsdp"] > 10 and not eight["fsdp"]["divided"]["tensor"]
    assert eight["tensor"]["divided"]["fsdp"] > 10 and eight["tensor"]["divided"]["tensor"] >= 8


def test_samples_are_spread_over_data_and_fsdp_but_not_tensor(eight):
    assert eight["shards"] == ["8", "8", "1"]


def test_a_mapped_function_sees_the_parts_and_returns_the_whole(eight):
    assert eight["map"] and eight["map_parts"] == 8


def test_two_processes_find_each_other_and_work_on_one_array():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = [answer(p) for p in [start(meet, port, number) for number in (0, 1)]]
    assert answers == [
        [[True, True], True, 6.0, [4, 3], 2],
        [[True, True], False, 6.0, [4, 3], 2],
    ]


# ---- rules, on a mesh without devices ----


def specs(tree, *, min_size=64, **axes):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, **axes}
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    placed = shardings_for(tree, mesh, min_size=min_size)
    return jax.tree.map(lambda s: tuple(s.spec), placed)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


def test_widening_layers_are_divided_by_outputs_and_narrowing_ones_by_inputs():
    names = ("attn/qkv", "mlp/fc1", "cross_attn/q", "cross_attn/kv", "attn/proj", "mlp/fc2")
    tree = {f"blocks/0/{name}/kernel": shape(16, 16) for name in names}
    found = specs(tree, tensor=2)
    assert [found[f"blocks/0/{name}/kernel"] for name in names[:4]] == [(None, "tensor")] * 4
    assert [found[f"blocks/0/{name}/kernel"] for name in names[4:]] == [("tensor", None)] * 2
    assert specs({"input_proj/kernel": shape(16, 16)}, tensor=2)["input_proj/kernel"] == (None,) * 2


def test_fsdp_takes_the_largest_axis_that_is_left_and_divides():
    tree = {
        "mlp/fc1/kernel": shape(16, 64),
        "conv/kernel": shape(3, 3, 8, 16),
        "odd/kernel": shape(15, 12),
        "never/kernel": shape(15, 15),
    }
    assert specs(tree, fsdp=4) == {
        "mlp/fc1/kernel": (None, "fsdp"),
        "conv/kernel": (None, None, None, "fsdp"),
        "odd/kernel": (None, "fsdp"),
        "never/kernel": (None, None),
    }
    assert specs(tree, fsdp=4, tensor=2)["mlp/fc1/kernel"] == ("fsdp", "tensor")


def test_small_and_one_dimensional_leaves_lie_everywhere():
    tree = {"fc1": {"kernel": shape(4, 8), "bias": shape(4096)}, "scale": shape()}
    assert specs(tree, fsdp=2, tensor=2) == {
        "fc1": {"kernel": (None, None), "bias": (None,)},
        "scale": (),
    }


def test_stacked_blocks_are_divided_as_single_ones():
    tree = {"attn/qkv/kernel": shape(6, 8, 24), "attn/proj/kernel": shape(6, 8, 8)}
    assert specs(tree, tensor=2) == {
        "attn/qkv/kernel": (None, None, "tensor"),
        "attn/proj/kernel": (None, "tensor", None),
    }


def test_the_optimizer_state_lies_where_its_parameters_do():
    params = {"mar": {"attn": {"qkv": {"kernel": jnp.zeros((16, 48)), "bias": jnp.zeros(48)}}}}
    state = optax.adamw(1e-3).init(params)
    moments = specs(state, fsdp=2, tensor=2)[0]
    assert moments.mu == moments.nu == specs(params, fsdp=2, tensor=2)
    assert moments.mu["mar"]["attn"]["qkv"]["kernel"] == ("fsdp", "tensor")


# ---- errors, and a single process ----


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 2}, "2 data x 1 fsdp x 1 tensor does not fit 1 devices"),
        ({"fsdp": 3}, "any number of data x 3 fsdp x 1 tensor does not fit 1 devices"),
        ({"tensor": 0}, "at least 1"),
        ({"data": 0}, "at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_explained(axes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**axes, devices=jax.devices()[:1])


def test_the_mesh_has_automatic_axes_and_takes_what_is_left():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_batch_that_does_not_divide_evenly_is_refused():
    alone = make_mesh(devices=jax.devices()[:1])
    assert shard_batch(alone, {"x": np.zeros((3, 2))})["x"].shape == (3, 2)
    message = answer(start(refuse_a_batch, devices=2))
    assert message.startswith("a batch of 3 samples does not divide evenly over the mesh's 2 data")


def refuse_a_batch():
    try:
        shard_batch(make_mesh(), {"x": np.zeros((3, 2))})
    except UserError as error:
        return str(error)
    return "no error"


def test_nothing_is_joined_unless_asked(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    assert initialize_distributed(DistributedOptions()) is False
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert initialize_distributed(DistributedOptions()) is False
    assert is_primary()
    barrier("alone")  # returns at once


def test_a_coordinator_without_the_rest_is_refused():
    with pytest.raises(UserError, match="belong together, but are 'host:1', 0 and 0"):
        initialize_distributed(DistributedOptions(coordinator_address="host:1", process_id=0))


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
