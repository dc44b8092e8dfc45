"""Classes that users bring, named as "package.module:Class" in the configuration."""

from __future__ import annotations

import importlib

from uva_jax.runtime.errors import UserError


def named_class(what: str, name: str) -> type | None:
    """Imports a class, or returns None if its module has no class of that name.

    Args:
      what: kind of the class, for the message, such as "simulator".
      name: "package.module:Class".

    Raises:
      UserError: the module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"the {what} {name!r} cannot be imported ({error}): install its package or put it on "
            "PYTHONPATH"
        ) from error
    return found if isinstance(found, type) else None
