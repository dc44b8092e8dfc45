"""`bench distill`: times a step of Stage 1 of all operators, here and in a plain PyTorch loop.

Here the cross-attentions take a step on the memory's features, which are computed once for all
windows, and the other operators of all blocks take theirs together under `vmap`. The PyTorch loop
trains the same operators one after the other on the same cached activations, each with an optimiser
of its own: the cross-attentions of all blocks, which form one stream, then every block's
self-attention, then every block's MLP. With fresh noise it recomputes the teacher's blocks up to
the operator's; otherwise both read the stored activations.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from uva_jax.cli import bench_turns
from uva_jax.cli.bench_models import policy_config, random_policy, settings
from uva_jax.cli.bench_turns import COMPILED, OURS, ROUNDED, TORCH, Row, Work
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.sections_graft import DistillOptions
from uva_jax.runtime.settings import section

FRESH, STORED = "fresh noise", "stored activations"
FEATURES = "cross_attn from features"  # of PyTorch: what this project's caching would save it
_STEPS = 4  # of a call, as the stage runs `distill.log_every` steps in one program


def activations(config: PolicyConfig, samples: int) -> dict[str, np.ndarray]:
    """Returns random activations in the place of the capture's, float32; see `cache_arrays`."""
    rng, head, mar = np.random.default_rng(0), config.action_head, config.mar
    rows = (head.n_actions, head.width)

    def normal(*shape):
        return rng.standard_normal((samples, *shape), np.float32)

    return {
        "z": normal(mar.n_tokens, mar.decoder_embed_dim),
        "actions": np.clip(normal(head.n_actions, head.channels), -1, 1),
        "condition": normal(*rows),
        "predicted": normal(*rows),
        "h": normal(head.depth, *rows),
        "residual": normal(head.depth, *rows),
        "t": rng.integers(0, 1000, samples, np.int32),
    }


def build(
    backend: str, *, size: str, dtype: str, batch: int, noise: str, products: str = "default"
) -> dict[str, Work]:
    """Returns a step of each operator family; see `bench_turns.measure`.

    `products` is the setting `distill.matmul_precision`.
    """
    options = section(settings(size).distill, DistillOptions)
    options = dataclasses.replace(
        options, batch=batch, fresh_noise=noise == FRESH, matmul_precision=products
    )
    teacher, graft = policy_config(size, "teacher"), policy_config(size, "graft")
    if backend == OURS:
        return _ours(teacher, graft, options, dtype)
    from convert.torch import distilling

    data = activations(graft, batch)
    found = distilling.steps(teacher, graft, options, data, dtype, backend == COMPILED)
    return {name: Work(*step) for name, step in found.items()}


def _ours(teacher, graft, options: DistillOptions, dtype: str) -> dict[str, Work]:
    import jax
    import jax.numpy as jnp

    from uva_jax.cli.flops import flops
    from uva_jax.graft import distill, distill_blocks
    from uva_jax.models import surgery
    from uva_jax.train.fit import make_fit

    head = random_policy(graft, dtype).action_head
    data = activations(graft, 2 * options.batch)
    features = distill.memory_features(head, data.pop("z"))
    data = {k: jnp.asarray(v) for k, v in data.items()}
    for name in ("condition", "predicted", "h", "residual"):
        data[name] = data[name].astype(jnp.bfloat16)
    if options.fresh_noise:
        data = {k: data[k] for k in ("actions", "condition", "predicted")}

    arrays = surgery.flatten(head)
    queries = {k: v for k, v in arrays.items() if distill.learnt_by_cross_attention(k)}
    stream = distill.condition_loss(head, arrays, options.loss["cross_attn"])
    tokens = {f"feature{i}": x for i, x in enumerate(features)} | {"condition": data["condition"]}
    old = random_policy(teacher, dtype).action_head
    stacked, blocks = distill_blocks.block_training(head, old, data, options, seed=0)

    def work(loss, params, data, stacked_axes=0):
        # More steps than the bench runs, so that the learning rate never reaches its end.
        fit = make_fit(
            loss,
            len(data["condition"]),
            epochs=10_000,
            lr=options.lr,
            options=options,
            seed=0,
            stacked_axes=stacked_axes,
        )
        state, number = (params, fit.optimizer.init(params)), 0
        rows = np.arange(_STEPS * fit.batch).reshape(_STEPS, fit.batch) % (2 * options.batch)

        def run():
            nonlocal state, number
            steps = jnp.arange(number, number + _STEPS)
            state, scalars, _ = fit.advance(state, data, rows, steps)
            number += _STEPS
            return jax.block_until_ready((state, scalars))

        return Work(run, flops(fit.advance, state, data, rows, jnp.arange(_STEPS)) / _STEPS, _STEPS)

    return {
        "cross_attn": work(stream, queries, tokens),
        "self_attn and mlp": work(blocks, stacked, data, 1),
    }


def bench_distill(size: str, dtype: str, batch: int, compiled: bool) -> dict:
    """Measures a step of Stage 1 of all operators.

    Args:
      size: of the policies, "tiny" or "pusht".
      dtype: of products, "float32" or "bfloat16"; parameters are float32.
      batch: windows of a step.
      compiled: also measure `torch.compile`.

    Returns:
      the result of `bench_turns.measure`, and the arguments; each row also has "total", the
      seconds of a step of all operators.

    Raises:
      UserError: a process failed.
    """
    given = {"size": size, "dtype": dtype, "batch": batch}
    backends = (OURS, *bench_turns.torch_backends(compiled))
    rows = [
        Row(noise, backend, given | {"noise": noise})
        for noise in (FRESH, STORED)
        for backend in backends
    ]
    rows += [
        Row(f"{noise}{ROUNDED}", OURS, given | {"noise": noise, "products": "bfloat16"})
        for noise in (FRESH, STORED)
    ]
    result = given | bench_turns.measure(__name__, rows)
    for row in result["rows"]:
        named = (name for name in row["parts"] if name != FEATURES)
        row["total"] = sum(bench_turns.seconds(row, name) for name in named)
    return result


def table(result: dict) -> str:
    """Formats the result of `bench_distill`."""
    found = [
        f"{result['size']}: a step of Stage 1 for {result['batch']} windows in {result['dtype']}",
        *bench_turns.lines(result, {}),
        "",
        f"{'a step of all operators':<64}{'ms':>10}{'speed':>10}",
    ]
    totals = {(row["backend"], row["name"]): row["total"] for row in result["rows"]}
    for (backend, noise), total in totals.items():
        ratio = totals[TORCH, noise.removesuffix(ROUNDED)] / total
        found.append(f"{backend + ' ' + noise:<64}{1e3 * total:>10,.2f}{f'x{ratio:.2f}':>10}")
    return "\n".join(found)
