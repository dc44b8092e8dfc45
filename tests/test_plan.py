"""`plan`: its numbers are those of the programs, on simulated devices and for TPUs.

Devices must be configured before jax starts, so whole plans run in separate processes.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import pusht, pusht_tiny
from uva_jax.cli import plan, plan_costs, programs
from uva_jax.models import surgery
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.settings import check

ROOT = Path(__file__).parents[1]
TINY = ("--config", "configs/pusht_tiny.py")
# Stage 2 from frames, all of the decoder trained.
FRAMES = ("--config.finetune.freeze=()", "--config.finetune.reuse_cache=False")


def run_plan(*args):
    """Runs the command in a separate process."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        # Optimising the programs would take longer than everything else.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    return subprocess.run(
        [sys.executable, "-m", "uva_jax", "plan", *args],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def rows_of(output, columns):
    """Returns the printed table as {label: values}."""
    found = {}
    for line in output.splitlines():
        parts = re.split(r"\s{2,}", line.strip())
        if len(parts) == columns + 1:
            found[parts[0]] = parts[1:]
    return found


def number(text):
    return float(text.replace(",", ""))


@pytest.fixture(scope="module")
def on_eight():
    """Capture and Stage 2 of the small policy on 8 simulated devices."""
    done = run_plan(
        *TINY,
        *FRAMES,
        "--topology=cpu:8",
        "--only=capture,finetune",
        "--jobs=2",
        "--config.capture.strip=1",
        "--config.capture.batch=1",
        "--config.finetune.batch=8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_capture_needs_no_collectives(on_eight):
    rows = rows_of(on_eight, columns=2)
    assert rows["chips"] == ["8", "8"]
    counts = [v for k, v in rows.items() if k.endswith(", count")]
    assert counts and all(capture == "0" for capture, _ in counts)


def test_stage_2_sums_one_gradient_for_every_trained_parameter(on_eight):
    trained = float(re.search(r"([\d.]+) M train", on_eight)[1]) * 1e6
    lines = on_eight.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("all-reduce, count"))
    size = number(re.split(r"\s{2,}", lines[at + 1].strip())[2]) * 2**20
    # The gradients, and small arrays: norms and logged scalars.
    assert 4 * trained * 0.99 < size < 4 * trained * 1.05


def test_arguments_of_stage_2_are_the_state_the_frozen_and_the_batch(on_eight):
    config = check(pusht_tiny.get_config())
    teacher = plan.architecture(config, None)
    trained = float(re.search(r"([\d.]+) M train", on_eight)[1]) * 1e6
    # Parameters; averages, the best of them, and two moments of trained ones; the grafted head
    # is larger.
    least = 4 * (4 * trained + programs.parameters(teacher))
    found = number(rows_of(on_eight, 2)["arguments, MiB per chip"][1]) * 2**20
    assert least * 0.95 < found < least * 1.3


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_stage_2_compiles_for_a_tpu_slice():
    done = run_plan(*TINY, "--topology=v5e:2x4", "--only=finetune")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 chips on 2 host(s), 16 GiB each; bfloat16 products" in done.stdout
    rows = rows_of(done.stdout, columns=1)
    assert 0 < number(rows["memory in total, GiB per chip"][0]) < 16
    assert number(rows["all-reduce, count"][0]) > 0


def test_the_published_architecture_has_the_published_number_of_parameters():
    config = plan.ARCHITECTURES["pusht"]
    assert programs.parameters(config) == 327_535_175
    policy = surgery.abstract_policy(config)

    def count(module):
        return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module, nnx.Param)))

    assert count(policy.vae) == 66_456_019
    assert count(policy.mar.encoder_blocks) == count(policy.mar.decoder_blocks) == 85_054_464
    assert count(policy.video_head) == 35_749_920
    assert count(policy.action_head) == 52_225_876


def test_pusht_plans_for_the_published_checkpoint_before_it_is_downloaded():
    config = check(pusht.get_config())
    assert plan.architecture(config, None) == plan.ARCHITECTURES["pusht"]
    assert plan.architecture(check(pusht_tiny.get_config()), "pusht").image_size == 256


def test_the_architecture_comes_from_the_checkpoint_where_there_is_one():
    found = plan.architecture(check(pusht_tiny.get_config()), None)
    assert (found.image_size, found.action_head.width) == (64, 256)


def test_a_missing_checkpoint_of_unknown_architecture_is_an_error():
    config = pusht.get_config()
    config.teacher.checkpoint = "nowhere/mine.ckpt"
    with pytest.raises(UserError, match="no such file"):
        plan.architecture(check(config), None)
    with pytest.raises(UserError, match="it can be pusht"):
        plan.architecture(check(config), "libero")


def test_an_unknown_topology_lists_those_that_work():
    with pytest.raises(UserError, match="v4:2x2x1.*v5e:16x16.*v6e:4x4"):
        plan.open_slice("v7:2x2")


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"uva_jax\[plan\]"):
        plan.open_slice("v5e:4x4")


def test_a_batch_that_cannot_be_dealt_to_the_chips_is_an_error():
    done = run_plan(*TINY, "--topology=cpu:8", "--only=finetune", "--config.finetune.batch=60")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: config.finetune.batch is 60")
    assert "8 data shares" in done.stderr and "Traceback" not in done.stderr


HLO = """
  %all-reduce.2 = (f32[4096]{0:T(1024)}, bf16[64,32]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), x={}
  ROOT %ar = f32[8]{0} all-reduce-start(%c), to_apply=%region
  %ard = f32[8]{0} all-reduce-done(%ar)
  %ag = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%d), dimensions={0}
  %cp = (s8[100]{0}, s8[100]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%e)
  %fusion = f32[8]{0} fusion(%f), kind=kCustom, calls=%all-reduce-scatter.1
"""


def test_collectives_are_counted_by_kind_with_the_bytes_of_their_results():
    assert plan_costs.collectives(HLO) == {
        "all-reduce": (2, 4 * 4096 + 2 * 64 * 32 + 4 * 8),
        "all-gather": (1, 4 * 16 * 8),
        "collective-permute": (1, 100),
    }


def test_all_rounds_of_a_loop_count():
    def square(x):
        return jnp.tanh(x @ x)

    def rounds(x):
        return jax.lax.scan(lambda c, _: (square(c), None), x, None, length=10)[0]

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    body = jax.jit(square).lower(x)
    once = plan_costs.measure(jax.jit(rounds).lower(x))
    found = plan_costs.with_loop(once, programs.Loop(body, 9))
    assert found.flops == pytest.approx(10 * plan_costs.measure(body).flops, rel=0.01)


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory on HBM, the total memory required for HLO temporaries (30.5G) exceeds "
        "available HBM (15.75G).",
        "Ran out of memory in memory space hbm. Used 30.5G of 15.75G hbm. Exceeded by 14.75G.",
    ],
)
def test_a_program_that_does_not_fit_comes_with_what_to_change(message):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    program = programs.Program("Stage 2", "", 16, Lowered(), 50, ("--config.mesh.fsdp=4",))
    cost = plan_costs.measure(program.lowered)
    assert cost.total == 30.5 * 2**30
    (hint,) = plan.hints([(program, cost)], hbm=16)
    assert "does not fit: it needs 30.5 of 16 GiB" in hint and "--config.mesh.fsdp=4" in hint
    assert "191%" in plan.table([(program, cost)], hbm=16)


def test_stage_2_that_does_not_fit_is_told_to_recompute_and_to_divide():
    config = pusht_tiny.get_config()
    config.finetune.freeze, config.finetune.reuse_cache = (), False
    config.finetune.batch = 4
    program = programs.finetune_step(
        check(config), plan.architecture(check(config), None), jax.devices()[:1], None
    )
    assert "--config.finetune.gradient_checkpointing" in program.advice
    assert "--config.finetune.accumulate=2" in program.advice
