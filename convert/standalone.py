"""Joins the modules of the torch head into one file, for the environment that trained the policy.

UVA's own environment has Python 3.9 and torch 2.1, and this package asks for more. So an export
comes with `grafted_head.py`: the modules below, one after the other, without the imports of each
other. That is all the joining there is, because these modules import nothing else but the standard
library, torch and einops, import each other by `from ... import`, and have no two names in common.
"""

from __future__ import annotations

import ast
from importlib import resources
from pathlib import Path

from convert.formats.open_file import written_whole
from uva_jax.runtime.errors import UserError

NAME = "grafted_head.py"
MODULES = ("layers", "diffusion", "operators", "head_file", "head")  # each imports only from before
_PACKAGE = "convert.torch"
_FIRST = '"""The grafted action head of a UVA policy as a torch module; written by uva_jax.'
_HEADER = f'''{_FIRST}

    from grafted_head import GraftedActionHead

    policy.model.diffactloss = GraftedActionHead.from_checkpoint("grafted.ckpt")

Needs Python 3.8 or later, torch 2.0 or later and einops. The head is read from an exported .ckpt or
.safetensors file, and nothing that the file holds is executed.
"""

from __future__ import annotations

'''


def source() -> str:
    """The text of `grafted_head.py`."""
    imports, bodies = set(), []
    for name in MODULES:
        text = resources.files("convert").joinpath("torch", f"{name}.py").read_text("utf-8")
        own, body = _parts(text)
        imports |= own
        bodies.append(body)
    ordered = sorted(imports, key=lambda line: (line.startswith("from"), line))
    return _HEADER + "\n".join(ordered) + "\n\n\n" + "\n\n".join(bodies)


def check(path: Path) -> None:
    """Raises UserError if there is a file at `path` that no export wrote."""
    try:
        ours = not path.exists() or path.read_text("utf-8").startswith(_FIRST)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(
            f"{path} is no file that an export wrote, and would be replaced: move it away, or "
            "write to another folder."
        )


def write(path: Path) -> None:
    """Writes the file whole; raises UserError if that cannot be done."""
    text = source().encode()
    with written_whole(path, len(text)) as file:
        file.write(text)


def _parts(text: str) -> tuple[set[str], str]:
    """The imports of a module from outside the package, and what follows its imports."""
    imports, lines = set(), text.splitlines(keepends=True)
    last = 0
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            imports.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            if node.module != "__future__" and not node.module.startswith(_PACKAGE):
                imports |= {f"from {node.module} import {alias.name}" for alias in node.names}
        elif not (isinstance(node, ast.Expr) and node.lineno == 1):  # the docstring
            continue
        last = node.end_lineno
    return imports, "".join(lines[last:]).strip("\n") + "\n"
