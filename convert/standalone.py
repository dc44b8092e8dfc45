"""Joins the modules of the torch head into one file, for the environment that trained the policy.

UVA's own environment has Python 3.9 and torch 2.1, which is too old for this package. So an export
includes `grafted_head.py`: the modules below, concatenated without the imports of each other. This
works because they import only the standard library, torch and einops, import each other by
`from ... import`, and share no names.
"""

from __future__ import annotations

import ast
from importlib import resources
from pathlib import Path

from convert.formats.open_file import written_whole
from uva_jax.runtime.errors import UserError

NAME = "grafted_head.py"
MODULES = (
    "layers",
    "diffusion",
    "operators",
    "head_file",
    "head",
)  # each imports only earlier ones
_PACKAGE = "convert.torch"
_FIRST = '"""The grafted action head of a UVA policy as a torch module; written by uva_jax.'
_HEADER = f'''{_FIRST}

    from grafted_head import GraftedActionHead

    policy.model.diffactloss = GraftedActionHead.from_checkpoint("grafted.ckpt")

It needs Python 3.8 or later, torch 2.0 or later and einops. The head is read from an exported .ckpt
or .safetensors file without running code in it.
"""

from __future__ import annotations

'''


def source() -> str:
    """Returns the text of `grafted_head.py`."""
    imports, bodies = set(), []
    for name in MODULES:
        text = resources.files("convert").joinpath("torch", f"{name}.py").read_text("utf-8")
        own, body = _parts(text)
        imports |= own
        bodies.append(body)
    ordered = sorted(imports, key=lambda line: (line.startswith("from"), line))
    return _HEADER + "\n".join(ordered) + "\n\n\n" + "\n\n".join(bodies)


def check(path: Path) -> None:
    """Raises UserError if `path` is a file that no export wrote."""
    try:
        ours = not path.exists() or path.read_text("utf-8").startswith(_FIRST)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(
            f"{path} exists, but no export wrote it: move it away, or write to another folder"
        )


def write(path: Path) -> None:
    """Writes the file atomically.

    Raises:
      UserError: it cannot be written.
    """
    text = source().encode()
    with written_whole(path, len(text)) as file:
        file.write(text)


def _parts(text: str) -> tuple[set[str], str]:
    """Returns the external imports of a module, and its text after all imports."""
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
