"""`python -m uva_jax COMMAND`: lists the commands and runs one of them.

`python -m uva_jax.main --config ...` runs the pipeline, `python -m convert` converts checkpoints.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from uva_jax.runtime.errors import exit_status
from uva_jax.runtime.startup import quiet_libraries

# command -> (module with `main(argv)`, help line). A module is imported when its command runs.
COMMANDS = {
    "settings": ("uva_jax.cli.settings", "every setting with its default, range and comment"),
    "plan": ("uva_jax.cli.plan", "memory, FLOPs and time of a configuration on a TPU slice"),
    "sample": ("uva_jax.cli.sample", "predicted video and actions, compared with the recording"),
    "evaluate": ("uva_jax.cli.evaluate", "compare policies in a simulator, until it is decided"),
    "fvd": ("uva_jax.cli.fvd", "Fréchet video distance of policies on held-out windows"),
    "ablate": ("uva_jax.cli.ablate", "time and score of each part of a policy's training"),
    "worth": ("uva_jax.cli.worth", "a graft against its teacher, by head, recipe and data"),
    "bench": ("uva_jax.cli.bench", "speed of conversion and of training steps"),
    "import": ("uva_jax.cli.import_recordings", "convert recordings of other projects to a zarr"),
    "cache-activations": ("uva_jax.cli.steps", "capture the teacher's activations"),
    "distill-operator": ("uva_jax.cli.steps", "Stage 1 of one operator family"),
    "fine-tune": ("uva_jax.cli.steps", "Stage 2 from given operators"),
    "quick-test": ("uva_jax.cli.steps", "Stage 2 in under a minute, to see that it runs"),
}


def usage() -> str:
    """Returns the list of commands as text."""
    rows = [f"  {name:<19}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m uva_jax COMMAND [options]   (--help after a command lists them)",
            "",
            *rows,
            "",
            "The graft itself: python -m uva_jax.main --config configs/pusht_tiny.py "
            "--workdir runs/tiny",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for an unknown command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    quiet_libraries()
    module = importlib.import_module(COMMANDS[name][0])
    # A module that serves several commands gets the command's name as its first argument.
    shared = [other for other, (path, _) in COMMANDS.items() if path == COMMANDS[name][0]]
    return module.main([name, *rest] if len(shared) > 1 else rest)


if __name__ == "__main__":
    sys.exit(main())
