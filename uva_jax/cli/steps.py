"""The stages of a graft as single commands, for users of the separate scripts of the PyTorch graft.

Run them with `python -m uva_jax COMMAND`:

    cache-activations --checkpoint pusht.ckpt --dataset pusht.zarr --out cache
    distill-operator --cache cache --target_layer cross_attn --out operators
    fine-tune --checkpoint pusht.ckpt --dataset pusht.zarr --operators operators --out tuned
    quick-test --operators operators --out quick

Each command runs stages of the pipeline, so it skips finished work, resumes interrupted work, and
keeps the layout of a workdir: a workdir can be the `--cache`, its operators/ the `--operators`.
Every option is a setting (`python -m uva_jax settings`) with its default; `--set` sets any other.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from uva_jax.runtime import settings
from uva_jax.runtime.errors import UserError, exit_status
from uva_jax.runtime.sections_graft import FAMILIES
from uva_jax.runtime.startup import quiet_libraries

# option -> setting, which gives its type, default and help; "{layer}" is the target layer
_SOURCE = {"checkpoint": "teacher.checkpoint", "dataset": "data.path"}
_CACHE = _SOURCE | {name: f"capture.{name}" for name in ("num_samples", "strip", "batch")}
_DISTILL = {"loss": "distill.loss.{layer}"} | {
    name: f"distill.{name}" for name in ("epochs", "lr", "batch")
}
_FINETUNE = (
    _SOURCE
    | {name: f"finetune.{name}" for name in ("steps", "warmup", "batch", "data_fraction")}
    | {"learning_rate": "finetune.lr"}
    | {
        name: f"finetune.{name}"
        for name in ("freeze_encoder", "gradient_checkpointing", "use_lora")
    }
)


def cache_activations(args: argparse.Namespace) -> None:
    """Converts the checkpoint and caches its activations: OUT/teacher and OUT/activations."""
    from uva_jax.main import run

    run(_config(args, _CACHE), args.out, ["convert", "capture"])


def distill_operator(args: argparse.Namespace) -> None:
    """Distils one family of operators from a cache into OUT/<target layer>.

    The order is cross_attn, self_attn, mlp. Each family trains with the families before it, from
    OUT or `--operators`. Self-attention and MLP need the condition that the cross-attention
    predicts.

    Raises:
      UserError: the cache is unfinished, or there is no cross-attention yet.
    """
    from uva_jax.pipeline import engine

    cache, layer = Path(args.cache), args.target_layer
    given = Path(args.operators or args.out)
    config = _config(args, {k: v.format(layer=layer) for k, v in _DISTILL.items()})
    config.distill.operators = (layer,)
    used = FAMILIES if args.operators else FAMILIES[: FAMILIES.index(layer)]
    found = _operators(given, [family for family in used if family != layer])
    config.head.init_paths.update(found)
    form = config.head.cross_attention
    if form == "condition" and layer != "cross_attn" and "cross_attn" not in found:
        raise UserError(
            f"{layer} operators need the condition that cross_attn operators predict, but "
            f"{given / 'cross_attn'} holds none: distil --target_layer cross_attn first, or give "
            "their folder with --operators"
        )
    stage = engine.Stage(
        f"distill-{layer}",
        lambda context: _distill_stage(context, cache, layer),
        needs=(),
        config_keys=("seed", "distill", "head"),
        folder=layer,
        describe=f"trains {layer} operators on the teacher's activations",
        fingerprint=lambda config: {
            "teacher": cache / "teacher" / "done.json",
            "activations": cache / "activations" / "done.json",
            **{f"head.init_paths.{k}": v for k, v in config.head.init_paths.items() if v},
        },
    )
    for name in ("teacher", "activations"):
        if not (cache / name / "done.json").exists():
            raise UserError(
                f"--cache {cache} has no finished {name}/: give a folder that cache-activations "
                "has filled, or a workdir whose capture has finished"
            )
    engine.run_pipeline([stage], settings.check(config), args.out)


def _distill_stage(context, cache: Path, layer: str) -> dict:
    from uva_jax.graft import assemble, distill, stage1
    from uva_jax.models import policy_folder
    from uva_jax.storage import sample_store

    config = context.config
    metrics = stage1.distill_operators(
        policy_folder.load_policy(cache / "teacher" / "policy"),
        sample_store.SampleStore.open(cache / "activations" / "train"),
        sample_store.SampleStore.open(cache / "activations" / "held_out"),
        head_options=settings.section(config.head, assemble.HeadOptions),
        options=settings.section(config.distill, distill.DistillOptions),
        seed=config.seed,
        folder=context.folder,
        metrics=context.metrics,
    )
    # The stage's folder becomes the operator itself; operator.json, which marks it, comes last.
    made = context.folder / layer
    shutil.rmtree(context.folder / "params", ignore_errors=True)  # left by a killed run
    for name in ("params", "metrics.json", "operator.json"):
        os.replace(made / name, context.folder / name)
    made.rmdir()
    return metrics


def fine_tune(args: argparse.Namespace) -> None:
    """Converts, assembles and fine-tunes a graft: OUT/grafted and OUT/finetune.

    Raises:
      UserError: the folder of operators holds none.
    """
    from uva_jax.main import run

    found = _operators(Path(args.operators), FAMILIES)
    if not found:
        raise UserError(
            f"--operators {args.operators} holds no operators: give a folder of distill-operator "
            f"with some of {', '.join(FAMILIES)}"
        )
    config = _config(args, _FINETUNE, _head_settings(found))
    config.head.init_paths.update(found)
    run(config, args.out, ["convert", "finetune"])


def quick_test(args: argparse.Namespace) -> None:
    """Runs Stage 2 from given operators in under a minute, by configs/quick_test.py."""
    from configs import quick_test
    from uva_jax.main import run

    start = quick_test.get_config(args.operators)
    run(_config(args, {}, start=start), args.out, ["convert", "finetune"])


def _operators(folder: Path, families: Sequence[str]) -> dict[str, str]:
    """Returns the folders of the families that exist."""
    found = {family: folder / family for family in families}
    return {k: str(v) for k, v in found.items() if (v / "operator.json").exists()}


def _head_settings(found: Mapping[str, str]) -> dict[str, object]:
    """Returns the settings of the head that the operators were distilled for.

    Loading the operators raises an error if they disagree.
    """
    from uva_jax.storage.atomic import read_json

    about = read_json(Path(next(iter(found.values()))) / "operator.json")
    names = (
        "cross_attention memory adapter num_heads self_attn_heads cross_mlp_ratio mlp_ratio "
        "self_attn_window depth"
    ).split()
    # operator.json has the ratio, and no operators if they are those of a large head.
    found = {"head.size": "large"} | {f"head.{name}": about["head"][name] for name in names}
    return found | {"head.operators": tuple(",".join(t) for t in about["head"]["operators"])}


def _config(
    args: argparse.Namespace,
    table: Mapping[str, str],
    given: Mapping[str, object] | None = None,
    start: ConfigDict | None = None,
) -> ConfigDict:
    """Returns the defaults changed by the options and then by `--set`."""
    config = settings.defaults() if start is None else start
    given = dict(given or {})
    for option, name in table.items():
        if (value := getattr(args, option)) is not None:
            given[name] = value
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text} should be name=value, such as --set data.max_episodes=9")
        given[name] = _literal(value)
    for name, value in given.items():
        settings.assign(config, name, value)
    return config


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _add_options(parser: argparse.ArgumentParser, table: Mapping[str, str]) -> None:
    specs = settings.specs()
    for option, name in table.items():
        # The settings of the layers have one type and one comment.
        named = {layer: specs[name.format(layer=layer)] for layer in FAMILIES}
        spec, shown = named[FAMILIES[0]], f"{named[FAMILIES[0]].default}"
        if "{layer}" in name:
            shown = ", ".join(f"{s.default} for {layer}" for layer, s in named.items())
        kind = {"action": argparse.BooleanOptionalAction}
        if spec.kind is not bool:
            kind = {"type": spec.kind, "metavar": option.upper()}
        text = f"{spec.rule.comment} (default: {shown})".replace("%", "%%")
        parser.add_argument(f"--{option}", default=None, help=text, **kind)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m uva_jax", description="Runs single stages of a graft."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, table in (
        ("cache-activations", cache_activations, _CACHE),
        ("distill-operator", distill_operator, _DISTILL),
        ("fine-tune", fine_tune, _FINETUNE),
        ("quick-test", quick_test, {}),
    ):
        text = function.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        if function is distill_operator:
            command.add_argument("--cache", required=True, help="folder of cache-activations")
            command.add_argument("--target_layer", required=True, choices=FAMILIES)
            command.add_argument("--operators", help="folder of earlier operators (default: OUT)")
        elif function is not cache_activations:
            command.add_argument("--operators", required=True, help="folder of distill-operator")
        _add_options(command, table)
        command.add_argument("--out", required=True, help="folder to write to; made if missing")
        command.add_argument(
            "--set", action="append", default=[], metavar="NAME=VALUE", help="set any other setting"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; bad input prints one sentence on stderr and returns status 2."""
    quiet_libraries()
    args = _parser().parse_args(argv)
    return exit_status(lambda: args.function(args))


if __name__ == "__main__":
    sys.exit(main())
