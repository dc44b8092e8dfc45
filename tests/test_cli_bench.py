"""`bench policy|capture|distill|finetune`: both frameworks do the same work, and are timed."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG

from uva_jax.cli import (
    bench,
    bench_capture,
    bench_distill,
    bench_finetune,
    bench_models,
    bench_policy,
    bench_turns,
)
from uva_jax.cli.bench_turns import OURS, TORCH, Row
from uva_jax.cli.flops import flops
from uva_jax.graft import assemble
from uva_jax.models import surgery
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections_graft import HeadOptions

pytestmark = pytest.mark.usefixtures("quick_compilation")
torch = pytest.importorskip("torch")
acting = pytest.importorskip("convert.torch.acting")
reference = pytest.importorskip("convert.torch.reference")
grafting = pytest.importorskip("convert.torch.grafting")
timing = pytest.importorskip("convert.torch.timing")


def small(size, head):
    """Stands in for `policy_config`: the small policy of the tests, grafted as a size's."""
    options = HeadOptions(num_heads=4, self_attn_heads=4)
    grafted = assemble.grafted_config(surgery.abstract_policy(CONFIG), options)
    if head == "shortened graft":
        grafted = dataclasses.replace(grafted, prediction="x0_from_eps", sampling_steps="1")
    return CONFIG if head == "teacher" else dataclasses.replace(CONFIG, action_head=grafted)


def build(module, monkeypatch, backend, **options):
    monkeypatch.setattr(module, "policy_config", small)
    parts = module.build(backend, size="tiny", dtype="float32", **options)
    for part in parts.values():
        part.before()
        part.run()
    return parts


def test_operations_of_loops_convolutions_and_gradients_are_counted():
    x, w, kernel = jnp.ones((2, 3)), jnp.ones((3, 3)), jnp.ones((5, 5, 4, 7))

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=10)[0]

    assert flops(loop, x, w) == 10 * 2 * 2 * 3 * 3
    assert flops(jax.grad(lambda w: ((x @ w) ** 2).sum()), w) == 2 * (2 * 2 * 3 * 3)
    assert flops(jax.jit(lambda w: jax.vmap(lambda a: a @ w)(x)), w) == 2 * 2 * 3 * 3
    assert flops(lambda x: (x @ w, x)[1], x) == 0  # nothing depends on the product
    images = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    found = flops(
        lambda x: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        images,
    )
    assert found == 2 * 8 * 8 * 7 * 5 * 5 * 4


@pytest.mark.parametrize("head", bench_models.HEADS)
def test_both_calls_do_the_same_work(monkeypatch, head):
    options = {"head": head, "batch": 2, "sampling_steps": "4"}
    ours = build(bench_policy, monkeypatch, OURS, **options)
    torch_parts = build(bench_policy, monkeypatch, TORCH, **options)
    assert torch_parts.keys() - ours.keys() == {bench_policy.UPSTREAM}
    for name in ("VAE", "transformer", "condition", "loop"):
        # Upstream embeds the condition in every step.
        assert ours[name].flops == pytest.approx(torch_parts[name].flops, rel=0.5), name
    more = torch_parts[bench_policy.UPSTREAM].flops - torch_parts[bench_policy.CALL].flops
    assert more == pytest.approx(3 * torch_parts["VAE"].flops)  # three further frames


def test_calls_follow_each_other_as_in_an_episode(monkeypatch):
    following = bench_policy.windows(CONFIG, 1)
    before, after = following(), following()
    np.testing.assert_array_equal(before[:, 2:], after[:, :2])
    assert not np.array_equal(before[:, :2], after[:, 2:])


@pytest.mark.parametrize("head", bench_models.HEADS)
def test_the_timed_parts_of_sampling_equal_the_heads_own(head):
    config = small("tiny", head)
    steps = "1" if head == "shortened graft" else "4"
    config = dataclasses.replace(config.action_head, sampling_steps=steps)
    if head == "teacher":
        module = timing.ready(reference.MLPHead(config))
    else:
        module = timing.ready(grafting.GraftedActionHead(dataclasses.asdict(config)))
    z, noise = torch.randn(2, 64, 32), torch.randn(int(steps) + 1, 2, 16, 2)
    find, loop = acting.sampler(module, steps)
    with torch.no_grad():
        found = loop(find(z), noise, 0.9)
        torch.testing.assert_close(found, module.sample(z, 0.9, noise=noise))


def test_steps_of_stage_2_do_the_same_work_and_more_from_frames(monkeypatch):
    sources = (bench_finetune.TOKENS, bench_finetune.FROZEN, bench_finetune.WHOLE)
    ours, training = (
        build(bench_finetune, monkeypatch, OURS, batch=4, source=source)["step"]
        for source in (sources[0], bench_finetune.LATENTS)
    )
    tokens, frozen, whole = (
        build(bench_finetune, monkeypatch, TORCH, batch=4, source=source)["step"].flops
        for source in sources
    )
    # Ours computes the features of the memory before the steps.
    assert 0.5 * tokens < ours.flops < tokens
    assert tokens < frozen < whole
    # What torch spends on frames that are encoded in every step is left.
    assert ours.flops < training.flops < whole - (frozen - tokens) + tokens


def test_a_torch_step_trains_and_averages_what_is_not_frozen():
    options = bench_finetune.options_of("tiny", 4, bench_finetune.WHOLE)
    layer = torch.nn.Linear(3, 3)
    training = grafting.Training(layer.parameters(), options, average=True)
    before = layer.weight.detach().clone()
    training.step(layer(torch.ones(2, 3)).sum())
    moved = layer.weight.detach() - before
    torch.testing.assert_close(moved, torch.full((3, 3), -options.lr), rtol=0.3, atol=0)
    torch.testing.assert_close(training._average[0], before + 0.01 * moved)


@pytest.mark.parametrize("noise", [bench_distill.FRESH, bench_distill.STORED])
def test_steps_of_stage_1_train_every_operator(monkeypatch, noise):
    ours = build(bench_distill, monkeypatch, OURS, batch=4, noise=noise)
    loop = build(bench_distill, monkeypatch, TORCH, batch=4, noise=noise)
    # Ours shares an operator's result between the two families; the loop computes it for each.
    together = loop["self_attn"].flops + loop["mlp"].flops
    assert 0.4 * together < ours["self_attn and mlp"].flops < together
    features = loop[bench_distill.FEATURES].flops
    assert ours["cross_attn"].flops == pytest.approx(features, rel=0.15)
    assert features < loop["cross_attn"].flops


def test_captures_do_the_same_work_and_share_frames(monkeypatch):
    ours, shared, apart = (
        build(bench_capture, monkeypatch, backend, strips=1, frames=frames)["a window"]
        for backend, frames in (
            (OURS, bench_capture.SHARED),
            (TORCH, bench_capture.SHARED),
            (TORCH, bench_capture.APART),
        )
    )
    assert ours.count == shared.count == 13
    assert ours.flops == pytest.approx(shared.flops, rel=0.15)
    assert apart.flops > 2 * shared.flops


def test_rows_are_timed_in_turns(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent)]))
    rows = [Row(name, OURS, {"dtype": "float32", "name": name}) for name in ("fast", "slow")]
    result = bench_turns.measure("bench_example", rows)
    fast, slow = result["rows"]
    assert bench_turns.seconds(slow, "sleep") > 0.05 > bench_turns.seconds(fast, "sleep")
    assert result["peak"] > 1e8 and fast["memory"] > 1e7
    lines = bench_turns.lines(result, {"sleep": bench_turns.seconds(slow, "sleep")})
    assert lines[-1].startswith("uva_jax slow, sleep") and lines[-1].endswith("x1.00")


def test_a_row_that_fails_is_named(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent)]))
    rows = [Row("broken", OURS, {"dtype": "float32", "name": "broken"})]
    with pytest.raises(UserError, match="the process of uva_jax broken failed: .*no such example"):
        bench_turns.measure("bench_example", rows)


def test_bad_numbers_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["policy", "--batch", "0"])
    assert stop.value.code == 2
    assert bench.main(["policy", "--size", "tiny", "--sampling-steps", "2000"]) == 2
    assert "ask for fewer" in capsys.readouterr().err


def rows(*parts):
    """Returns rows of a result, each (backend, name, {part: seconds})."""
    return [
        {
            "backend": backend,
            "name": name,
            "memory": 2_000_000,
            "total": sum(times.values()),
            "parts": {part: {"seconds": t, "flops": 1e9} for part, t in times.items()},
        }
        for backend, name, times in parts
    ]


def test_tables_name_the_rows_and_the_ratios(monkeypatch, tmp_path, capsys):
    base = {"size": "tiny", "dtype": "float32", "batch": 1, "peak": 1e10}
    found = base | {
        "rows": rows((OURS, "from tokens", {"step": 0.5}), (TORCH, "from tokens", {"step": 1.0}))
    }
    monkeypatch.setattr(bench_finetune, "bench_finetune", lambda **given: found)
    assert bench.main(["finetune", "--json", str(tmp_path / "found.json")]) == 0
    line = capsys.readouterr().out.splitlines()[3]
    assert line.split() == "uva_jax from tokens, step 500.00 1.00 20.0% 2 x2.00".split()
    assert json.loads((tmp_path / "found.json").read_text()) == found
    both = {"cross_attn": 1.0, "mlp": 2.0}
    found = base | {
        "rows": rows((OURS, "fresh noise", {"blocks": 1.5}), (TORCH, "fresh noise", both))
    }
    assert bench_distill.table(found).splitlines()[-2].endswith("x2.00")
    call = {"call": 0.5, "call, all frames": 1.0}
    found = base | {
        "sampling_steps": "100",
        "rows": rows((OURS, "teacher", {"call": 0.1}), (TORCH, "teacher", call)),
    }
    assert "x10.00" in bench_policy.table(found)
    found = base | {
        "strips": 1,
        "strip": 1,
        "rows": rows((TORCH, "frames apart", {"a window": 0.1})),
    }
    assert bench_capture.table(found).endswith("torch frames apart: 10.0 windows/s")
