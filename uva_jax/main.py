"""The command line: `python -m uva_jax.main --config configs/pusht_tiny.py --workdir runs/tiny`.

Reads flags, checks the configuration, and hands over to the pipeline. With `--checkpoint FILE` in
the place of `--config`, the checkpoint says which configuration is its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging
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
    """Checks the configuration and runs its stages; see `pipeline.run_pipeline`."""
    config = check(config)
    # After the check, because importing jax and its company takes seconds.
    from uva_jax.pipeline import stages
    from uva_jax.pipeline.engine import run_pipeline
    from uva_jax.runtime import parallel

    parallel.initialize_distributed(section(config.distributed, DistributedOptions))
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
    logging.set_verbosity(logging.WARNING)  # orbax tells every file it touches
    try:
        _CONFIG.value.keys()
    except OSError as error:  # ml_collections keeps it until the configuration is used
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the --config file cannot be read: {reason}") from error
    run(_CONFIG.value, _WORKDIR.value, _STAGE.value)
    return 0


def main() -> int:
    """Entry point: bad input is one sentence on stderr and exit status 2."""
    quiet_libraries()
    return exit_status(lambda: app.run(_main, flags_parser=_parse))


def _parse(argv: list[str]) -> list[str]:
    """absl's parsing, with a sentence in place of a traceback."""
    for argument in argv[1:]:
        if argument.startswith("--config."):
            check_name(argument.removeprefix("--config.").partition("=")[0], inside=False)
    argv = _with_config(argv)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # What `get_config` raised is told in its own words, not as the traceback made of it.
        raise _said_by_config(error) or UserError(f"{error}") from error
    except (SyntaxError, ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the --config file does not work: {error!r}") from error


def _with_config(argv: list[str]) -> list[str]:
    """The arguments with what `--checkpoint` stands for: its configuration and its setting."""
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
    # A configuration has to be known before its settings are.
    return [argv[0], *added[:-1], *argv[1:], added[-1]]


def _said_by_config(error: BaseException | None) -> UserError | None:
    while error is not None:
        if isinstance(error, UserError) and "Traceback" not in str(error):
            return error
        error = error.__context__
    return None


if __name__ == "__main__":
    sys.exit(main())
