"""Every setting with its default, range and comment: `python -m uva_jax settings [PATTERN]`.

A pattern such as `finetune`, `lr` or `*.steps` chooses those whose names hold it.
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
    """A line for each setting that the pattern chooses, and its comment below.

    Raises:
      UserError: no setting's name holds the pattern.
    """
    chosen = [s for s in specs().values() if fnmatch.fnmatchcase(s.name, f"*{pattern}*")]
    if not chosen:
        raise UserError(
            f"no setting's name holds {pattern!r}: python -m uva_jax settings lists them all"
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
    """Entry point: bad input is one sentence on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m uva_jax settings",
        description="Lists settings: name = default (range), and what each is.",
    )
    parser.add_argument("pattern", nargs="?", default="", help="part of the name; * stands for any")
    args = parser.parse_args(argv)

    def command() -> None:
        print(table(args.pattern, min(100, shutil.get_terminal_size((100, 24)).columns)))

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
