"""The engine that runs stages: skips finished ones, resumes unfinished ones, reruns changed ones.

A stage is identified by a hash of the configuration keys that shape it and of everything it reads.
That hash stands in `started.json` from the moment its folder exists and in `done.json` once it has
finished, so the state on disk says all there is to know and a run may be killed at any moment.
The stages themselves live in `pipeline/stages.py`; nothing here knows what they do.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from uva_jax.runtime.errors import UserError
from uva_jax.runtime.guards import end_if_stopped, full_disk_as_user_error, locked, stop_signals
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.storage.atomic import new_folder, read_json, write_json
from uva_jax.storage.identity import Identity, external_hash, shaping_values


@dataclass(frozen=True)
class Context:
    """What a stage gets to work with.

    Attributes:
      config: the whole configuration; a stage may read only its `config_keys` of it.
      workdir: the run's folder.
      folder: the stage's own folder, which exists. It holds what an earlier, cut-off run of the
        same stage wrote, if there was one.
      metrics: the writer for this stage.
      inputs: folder of each stage in `needs` and `derived`.
      is_primary: this process writes; False on the other processes of a multi-host run.
      barrier: waits for all processes; takes a name that is the same on all of them.
    """

    config: FrozenConfigDict
    workdir: Path
    folder: Path
    metrics: MetricsWriter
    inputs: Mapping[str, Path]
    is_primary: bool
    barrier: Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
      name: what `--stage` calls it.
      run: does the work and returns metrics that JSON can hold. It is called again, in the same
        folder, after a run that was cut off, and should then go on from what it finds.
      needs: names of earlier stages whose folders it reads.
      config_keys: dotted keys that shape the result; a key may name a whole sub-tree.
      folder: where it writes, relative to the workdir; one stage a folder.
      describe: what it does, in a few words.
      fingerprint: from the configuration to the external files or folders it reads, by label. They
        are hashed by content.
      on_request: it runs only where it, or another one on request that needs it, is named.
      derived: names of earlier stages that it reads too, whose results follow from `needs` and
        `config_keys` alone. They are brought up to date without being named, and do not count in
        this stage's identity.
      unrecorded: names of files and folders that an earlier version of the package left in the
        stage's folder without a record; they are replaced.
    """

    name: str
    run: Callable[[Context], Mapping[str, Any]]
    needs: tuple[str, ...]
    config_keys: tuple[str, ...]
    folder: str
    describe: str = ""
    fingerprint: Callable[[FrozenConfigDict], Mapping[str, str | os.PathLike]] | None = None
    on_request: bool = False
    derived: tuple[str, ...] = ()
    unrecorded: tuple[str, ...] = ()


def run_pipeline(
    stages: Sequence[Stage],
    config: ConfigDict | FrozenConfigDict,
    workdir: str | os.PathLike,
    only: Sequence[str] | None = None,
    *,
    is_primary: bool = True,
    barrier: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, Any]]:
    """Brings stages up to date, in order, and returns the metrics of each.

    A finished stage whose configuration and inputs are unchanged is skipped; an unfinished one
    resumes in its folder; one whose configuration or inputs changed starts again from an empty
    folder, and so does what depends on it. Each stage ends by writing `done.json`.

    Args:
      stages: the table, each stage after the ones it needs.
      only: names of the stages to run; by default all but those on request. What they
        need must be up to date; what is `derived` for them runs too.
      is_primary, barrier: for several processes on one shared workdir. Only the primary locks and
        keeps records; all of them run the stages and meet at the barriers.

    Raises:
      UserError: an unknown stage name; a prerequisite that is missing or out of date; a workdir
        that cannot be used, is in use by another run, or whose disk is full.
      SystemExit: 143 after SIGTERM, 130 after SIGINT. The same command resumes.
    """
    table = _check_table(stages)
    unknown = [name for name in only or () if name not in table]
    if unknown:
        raise UserError(f"there is no stage {unknown[0]!r}: the stages are {', '.join(table)}")
    wanted = {name for name, s in table.items() if not s.on_request} if only is None else {*only}
    for name in reversed(table):
        if name in wanted and table[name].on_request:
            wanted |= {need for need in table[name].needs if table[need].on_request}
        if name in wanted:
            wanted |= set(table[name].derived)
    chosen = [name for name in table if name in wanted]
    engine = _Engine(table, FrozenConfigDict(config), Path(workdir).absolute(), is_primary, barrier)
    with ExitStack() as guards:
        guards.enter_context(stop_signals(engine.say))
        guards.enter_context(full_disk_as_user_error(engine.workdir))
        if is_primary:
            guards.enter_context(locked(engine.workdir, engine.say))
            write_json(engine.workdir / "config.json", engine.config.to_dict())
        barrier("pipeline:ready")
        engine.check_prerequisites(chosen)
        return {name: engine.run(name) for name in chosen}


@dataclass
class _Engine:
    table: Mapping[str, Stage]
    config: FrozenConfigDict
    workdir: Path
    is_primary: bool
    barrier: Callable[[str], None]
    identities: dict[str, Identity] = field(default_factory=dict)

    def say(self, line: str) -> None:
        if self.is_primary:
            print(line, flush=True)

    def folder(self, name: str) -> Path:
        return self.workdir / self.table[name].folder

    def identify(self, name: str) -> Identity:
        """Says what a stage's result must be shaped by, from configuration and files alone."""
        if name in self.identities:
            return self.identities[name]
        stage = self.table[name]
        inputs = {need: self.identify(need).hash for need in stage.needs}
        values = shaping_values(self.config.to_dict(), stage.config_keys)
        done = read_json(self.folder(name) / "done.json") or {}
        external = stage.fingerprint(self.config) if stage.fingerprint else {}
        for label, path in external.items():
            key = f"file {label}"
            if Path(path).exists():
                inputs[key] = external_hash(path, self.workdir)
            elif done.get("config") == values and key in done["inputs"]:
                inputs[key] = done["inputs"][key]  # used, and moved away since: still done
            else:
                raise UserError(
                    f"stage {name!r} reads {path} ({label}), which does not exist: check the path "
                    "in the configuration"
                )
        self.identities[name] = Identity(values, inputs)
        return self.identities[name]

    def check_prerequisites(self, chosen: Sequence[str]) -> None:
        """Raises UserError unless all that the chosen stages need is up to date or chosen too."""
        for name in chosen:
            self.identify(name)
        for name in self.table:  # in order, so that the first complaint is the first thing to run
            if name in chosen or name not in self.identities:
                continue
            done = read_json(self.folder(name) / "done.json")
            identity = self.identities[name]
            if identity.matches(done):
                continue
            state = (
                f"is out of date ({identity.changes(done)})"
                if done
                else f"has not finished in {self.workdir}"
            )
            raise UserError(
                f"--stage {','.join(chosen)} builds on stage {name!r}, which {state}: run that "
                f"first with --stage {name}, or leave out --stage to run all that is missing"
            )

    def run(self, name: str) -> dict[str, Any]:
        """Runs one stage, from the look at its folder to done.json, and returns its metrics."""
        end_if_stopped()
        stage, identity, folder = self.table[name], self.identify(name), self.folder(name)
        # every process looks before the primary changes anything, so that all decide alike
        done, started = read_json(folder / "done.json"), read_json(folder / "started.json")
        self.barrier(f"{name}:decided")
        if identity.matches(done):
            when = done["finished"][:16].replace("T", " ")
            self.say(f"{name}: done already ({when}, took {done['seconds']:.1f} s), skipped")
            return done["metrics"]
        resumes = done is None and identity.matches(started)
        clock = time.monotonic()
        with MetricsWriter(
            self.workdir, name, config=self.config, fresh=not resumes, enabled=self.is_primary
        ) as writer:
            if self.is_primary and not resumes:
                self._start_afresh(name, done, started)
            verb = "resuming where it was cut off" if resumes else "starting"
            self.say(f"{name}: {verb}" + (f" ({stage.describe})" if stage.describe else ""))
            self.barrier(f"{name}:prepared")
            inputs = {need: self.folder(need) for need in (*stage.needs, *stage.derived)}
            metrics = stage.run(
                Context(
                    config=self.config,
                    workdir=self.workdir,
                    folder=folder,
                    metrics=writer,
                    inputs=inputs,
                    is_primary=self.is_primary,
                    barrier=self.barrier,
                )
            )
        self.barrier(f"{name}:ran")
        seconds = time.monotonic() - clock
        if self.is_primary:
            write_json(
                folder / "done.json",
                {
                    "stage": name,
                    **identity.record(),
                    "metrics": metrics,
                    "seconds": round(seconds, 3),
                    "resumed": resumes,
                    "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    "versions": _versions(),
                },
            )
        self.barrier(f"{name}:done")
        self.say(f"{name}: finished in {seconds:.1f} s")
        return read_json(folder / "done.json")["metrics"]

    def _start_afresh(self, name: str, done: Mapping | None, started: Mapping | None) -> None:
        """Leaves a folder that holds nothing but started.json; never a half-removed old one."""
        # a stage's folder may be a link to another disk: the link stays, its target is replaced
        folder, identity = self.folder(name).resolve(), self.identify(name)
        if done or started:
            state = "finished" if done else "cut off"
            changes = identity.changes(done or started)
            self.say(f"{name}: was {state} with other settings or inputs, cleared ({changes})")
        elif left := {p.name for p in folder.iterdir()} if folder.exists() else set():
            if left <= {*self.table[name].unrecorded}:
                self.say(f"{name}: {folder} was written by an earlier version, replaced")
            else:
                raise UserError(
                    f"{folder} is where stage {name!r} writes, but it holds files that no stage "
                    "wrote: move them away, or choose another --workdir"
                )
        with new_folder(folder) as new:  # the lock says that nobody else is at work on it
            write_json(new / "started.json", {"stage": name, **identity.record()})


def _check_table(stages: Sequence[Stage]) -> dict[str, Stage]:
    table: dict[str, Stage] = {}
    for stage in stages:
        missing = [need for need in (*stage.needs, *stage.derived) if need not in table]
        if missing or stage.name in table or stage.folder in {s.folder for s in table.values()}:
            raise ValueError(
                f"stage {stage.name!r} wants a name and a folder ({stage.folder!r}) of its own, "
                f"and to come after all that it needs (not before it: {missing})"
            )
        table[stage.name] = stage
    return table


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("uva_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
