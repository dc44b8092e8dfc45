"""Damaged and hostile checkpoints by kind, and the command line against them.

    python -m tests.hostile_files DIR

writes them all to DIR, runs `convert inspect` and `convert from_torch` on each, and prints how many
of each kind were refused. `inspect` reads only names and shapes, so it need not refuse files with
wrong values. No code in the files may run: a gadget would create the file DIR/marker.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # pytest adds this folder too

import hostile_safetensors as hs  # noqa: E402
import hostile_torch as ht  # noqa: E402

from convert.formats import safetensors_file  # noqa: E402
from uva_jax.models import description  # noqa: E402


class HostileFile(NamedTuple):
    """`said`: text that the error of `from_torch` must contain."""

    kind: str
    name: str
    path: Path
    said: str


def cases(folder: Path) -> dict[str, Callable[[], ht.Made]]:
    """Returns functions that make the files of each kind."""
    good, pair = ht.sound(folder / "good.ckpt"), folder / "good.safetensors"
    safetensors_file.write(pair, ht.sound_state(), description.describe(ht.CONFIG, {}))
    whole, words = good.read_bytes(), [("data/0", bytes(16))]

    def pickled(made: dict[str, bytes], entries: list = words) -> ht.Made:
        for name, content in made.items():
            yield name, "", lambda path, c=content: ht.archive(path, c, entries)

    lies = {name: ht.tensor_pickle(*lie) for name, lie in ht.LYING_TENSORS.items()}
    return {
        "pickle gadgets": lambda: ht.running(folder),
        "pickle bombs": lambda: pickled(ht.pickle_bombs()),
        "tensors that lie": lambda: pickled(lies),
        "cut short": lambda: ht.truncated(whole, ht.sections(good), "truncated"),
        "flipped bytes": lambda: ht.flipped(whole, ht.places(good), ""),
        "shapes": ht.shapes,
        "weights": ht.weights,
        "zip tricks": lambda: ht.zip_tricks(whole),
        "other formats": ht.other_formats,
        "configurations": ht.configurations,
        "settings": ht.settings,
        "normalisers": ht.normalisers,
        "safetensors headers": hs.headers,
        "safetensors pairs": lambda: hs.damaged_pairs(pair),
    }


KINDS = (
    *("pickle gadgets", "pickle bombs", "tensors that lie", "cut short", "flipped bytes", "shapes"),
    *("weights", "zip tricks", "other formats", "configurations", "settings", "normalisers"),
    *("safetensors headers", "safetensors pairs"),
)


def hostile_files(folder: Path, kinds: Sequence[str] = KINDS) -> Iterator[HostileFile]:
    """Writes the files of some kinds to a folder, one after another, and yields each.

    A valid checkpoint, good.ckpt, and a valid pair, good.safetensors, are written first.
    """
    made = cases(folder)
    for kind in kinds:
        ending = "safetensors" if kind.startswith("safetensors") else "ckpt"
        for number, (name, said, make) in enumerate(made[kind]()):
            path = folder / f"{kind.replace(' ', '_')}_{number:02}.{ending}"
            make(path)
            yield HostileFile(kind, name, path, said)


def command(*arguments: object) -> tuple[int, str]:
    """Runs `python -m convert` in this process; returns its exit status and stderr."""
    from convert.__main__ import main

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        status = main(list(map(str, arguments)))
    return status, printed.getvalue()


def _main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list] = {}
    for file in hostile_files(folder):
        row = rows.setdefault(file.kind, [0, 0, 0, ""])
        looked, _ = command("inspect", file.path)
        status, sentence = command("from_torch", file.path, folder / "policy")
        row[0] += 1
        row[1] += looked == 2
        row[2] += status == 2 and sentence.count("\n") == 1
        row[3] = sentence.strip().replace(f"{folder}/", "")
    print(f"{'kind':<22}{'files':>6}{'inspect':>9}{'from_torch':>12}  a sentence")
    for kind, (files, looked, refused, sentence) in rows.items():
        print(f"{kind:<22}{files:>6}{looked:>9}{refused:>12}  {sentence[:120]}")
    files, looked, refused = (sum(row[i] for row in rows.values()) for i in range(3))
    print(f"{'refused, of all':<22}{files:>6}{looked:>9}{refused:>12}")
    print(f"code was run: {'YES' if (folder / 'marker').exists() else 'no'}")
    return 0 if refused == files and not (folder / "marker").exists() else 1


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
