"""Lists settings with default, range and comment: `python -m uva_jax settings [PATTERN]`.

A pattern such as `finetune`, `lr` or `*.steps` selects the settings whose names contain it.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import sys
import textwrap
from collections.abc import Sequence

from uva_jax.runtime.errors import UserError, exit_status
from uva_jax.runtime.settings import specs


def table(pattern: str = "", width: int = 100) -> str:
    """Returns a line for each selected setting, with its comment below.

    Args:
      pattern: part of the name; * stands for any text.
      width: characters per line.

    Raises:
      UserError: no setting's name contains the pattern.
    """
    chosen = [s for s in specs().values() if fnmatch.fnmatchcase(s.name, f"*{pattern}*")]
    if not chosen:
        raise UserError(
            f"no setting's name contains {pattern!r}: python -m uva_jax settings lists them all"
        )
    lines = []
    for spec in chosen:
        bounds = f"  ({spec.rule.range})" if spec.rule.range else ""
        lines.append(f"{spec.name} = {spec.default!r}{bounds}")
        lines += textwrap.wrap(
            spec.rule.comment, width, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input prints one sentence on stderr and returns status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m uva_jax settings",
        description="Lists settings: name = default (range), and a comment.",
    )
    parser.add_argument("pattern", nargs="?", default="", help="part of the name; * is any text")
    args = parser.parse_args(argv)

    def command() -> None:
        print(table(args.pattern, min(100, shutil.get_terminal_size((100, 24)).columns)))

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
