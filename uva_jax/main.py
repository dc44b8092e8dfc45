"""The command line: `python -m uva_jax.main --config configs/pusht_tiny.py --workdir runs/tiny`.

It reads flags, checks the configuration and runs the pipeline. `--checkpoint FILE` in place of
`--config` selects the configuration file that fits the checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from uva_jax.runtime.errors import UserError, exit_status
from uva_jax.runtime.sections import DistributedOptions
from uva_jax.runtime.settings import check, check_name, section
from uva_jax.runtime.startup import quiet_libraries

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file (see configs/).")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "UVA checkpoint to graft; it also picks the --config if none is given."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.")
_STAGE = flags.DEFINE_list(
    "stage", None, "Stages to run, comma-separated (default: all that are not done)."
)


def run(config, workdir: str, only: list[str] | None) -> dict:
    """Checks the configuration and runs its stages; see `pipeline.engine.run_pipeline`."""
    config = check(config)
    # Importing jax takes seconds, so a wrong configuration is refused before.
    from uva_jax.pipeline import stages
    from uva_jax.pipeline.engine import run_pipeline
    from uva_jax.runtime import parallel, peers

    distributed = section(config.distributed, DistributedOptions)
    parallel.initialize_distributed(distributed)
    with peers.exit_together(distributed.coordinator_address):
        return run_pipeline(
            stages.stages(config),
            config,
            workdir,
            only or None,
            is_primary=parallel.is_primary(),
            barrier=parallel.barrier,
        )


def _main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(
            f"unexpected argument {argv[1]!r}; settings are given as --config.key=value"
        )
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise UserError(
            "say what to run and where: --config configs/pusht_tiny.py (or --checkpoint FILE) "
            "--workdir runs/tiny"
        )
    try:
        _CONFIG.value.keys()
    except OSError as error:  # ml_collections raises it when the configuration is first used
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the --config file cannot be read: {reason}") from error
    run(_CONFIG.value, _WORKDIR.value, _STAGE.value)
    return 0


def main() -> int:
    """Runs the command line; bad input prints one sentence on stderr and returns status 2."""
    quiet_libraries()
    return exit_status(lambda: app.run(_main, flags_parser=_parse))


def _parse(argv: list[str]) -> list[str]:
    """Parses flags with absl; raises UserError where absl would print a traceback."""
    for argument in argv[1:]:
        if argument.startswith("--config."):
            check_name(argument.removeprefix("--config.").partition("=")[0], inside=False)
    argv = _with_config(argv)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # absl wraps what `get_config` raised in a traceback; show the original sentence.
        raise _raised_by_config(error) or UserError(f"{error}") from error
    except (SyntaxError, ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the --config file does not work: {error!r}") from error


def _with_config(argv: list[str]) -> list[str]:
    """Replaces `--checkpoint FILE` by `--config` and `--config.teacher.checkpoint`."""
    names = ("--checkpoint", "-checkpoint")
    given = [(i, a) for i, a in enumerate(argv) if a.partition("=")[0] in names]
    if not given:
        return argv
    i, argument = given[-1]
    path = argument.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
    added = [f"--config.teacher.checkpoint={path}"]
    if not any(a.split("=")[0] in ("--config", "-config") for a in argv):
        from convert.describe import config_file_of

        added.insert(0, f"--config={Path(__file__).parents[1] / config_file_of(path)}")
    # absl needs --config before the settings that change it.
    return [argv[0], *added[:-1], *argv[1:], added[-1]]


def _raised_by_config(error: BaseException | None) -> UserError | None:
    while error is not None:
        if isinstance(error, UserError) and "Traceback" not in str(error):
            return error
        error = error.__context__
    return None


if __name__ == "__main__":
    sys.exit(main())
