"""The packages that each package may import, so that data flows one way.

Packages are in the order of the work: files and devices, models, data, training, grafting,
evaluation, the pipeline, and the commands.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# package -> other packages that its modules may import
ALLOWED = {
    "uva_jax.assets": set(),
    "uva_jax.runtime": set(),
    "uva_jax.storage": {"runtime"},
    "uva_jax.envs": {"runtime"},
    "uva_jax.models": {"runtime", "storage"},
    "uva_jax.data": {"assets", "runtime", "storage", "envs", "models"},
    "uva_jax.train": {"runtime", "storage", "models"},
    "uva_jax.graft": {"runtime", "storage", "models", "data", "train"},
    "uva_jax.eval": {"runtime", "storage", "envs", "models", "data"},
    "uva_jax.pretrain": {"runtime", "storage", "models", "data", "train", "convert"},
    "uva_jax.pipeline": {
        *("assets", "runtime", "storage", "models", "data", "train", "graft", "pretrain", "eval"),
        "convert",
    },
    "uva_jax.main": {"runtime", "pipeline", "convert"},
    "uva_jax.cli": {
        *("assets", "runtime", "storage", "envs", "models", "data", "train", "graft", "pretrain"),
        *("eval", "pipeline", "main", "convert", "configs"),
    },
    "uva_jax.__main__": {"runtime"},  # imports a command's module by name
    "convert": {"runtime", "storage", "models"},
    "convert.checks": {"runtime", "storage", "models", "data", "train", "eval"},
    "configs": {"runtime"},
}
# Modules with imports inside functions, which save start-up time of commands that do not need them.
DEFERRED = {
    "uva_jax.main",  # checks the configuration before jax is imported
    "uva_jax.cli",
    "convert.__main__",
}
# Optional packages, imported where they are needed.
OPTIONAL = {
    *("cv2", "h5py", "imagecodecs", "msgpack", "numcodecs", "tokenizers", "torch", "wandb"),
    "websockets",
}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("uva_jax", "convert", "configs"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return module if parts[0] == "uva_jax" and len(parts) < 2 else ".".join(parts[:2])


def short(module: str) -> str:
    """Returns the package's name in the values of ALLOWED."""
    parts = module.split(".")
    return parts[1] if parts[0] == "uva_jax" and len(parts) > 1 else parts[0]


def key_of(module: str) -> str:
    if module.startswith("convert.checks"):
        return "convert.checks"
    return module.split(".")[0] if module.startswith(("convert", "configs")) else room(module)


def imports(path: Path, known: dict[str, Path]):
    """Yields (imported module, whether inside a function) for every import of a file."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        deferred = id(node) in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in known else node.module), deferred


KNOWN = modules()
OWN = [name for name in KNOWN if name not in ("uva_jax", "configs", "convert")]


@pytest.mark.parametrize("module", OWN)
def test_a_module_imports_only_rooms_below_its_own(module):
    for imported, _ in imports(KNOWN[module], KNOWN):
        if imported.split(".")[0] in ("uva_jax", "convert", "configs") and imported != "uva_jax":
            own, other = key_of(module), short(imported)
            assert other == short(module) or other in ALLOWED[own], f"{module} imports {imported}"


@pytest.mark.parametrize("module", OWN)
def test_imports_stand_at_the_top_except_to_start_faster_or_for_an_extra(module):
    may_defer = any(module == name or module.startswith(f"{name}.") for name in DEFERRED)
    for imported, deferred in imports(KNOWN[module], KNOWN):
        if deferred and not may_defer:
            assert imported.split(".")[0] in OPTIONAL, f"{module} defers {imported}"


@pytest.mark.parametrize("module", OWN)
def test_torch_is_imported_in_convert_alone(module):
    for imported, _ in imports(KNOWN[module], KNOWN):
        if imported.split(".")[0] == "torch":
            assert module.startswith("convert."), f"{module} imports torch"


def test_no_module_imports_itself_through_others():
    graph = {
        name: {m for m, _ in imports(path, KNOWN) if m in KNOWN} for name, path in KNOWN.items()
    }
    state: dict[str, str] = {}

    def visit(name, trail):
        if state.get(name) == "open":
            raise AssertionError(f"circle: {' -> '.join([*trail, name])}")
        if name not in state:
            state[name] = "open"
            for other in sorted(graph[name]):
                visit(other, [*trail, name])
            state[name] = "closed"

    for name in graph:
        visit(name, [])


def test_nothing_but_entry_points_lies_at_the_top_of_the_package():
    top = {path.name for path in (ROOT / "uva_jax").glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "main.py"}
