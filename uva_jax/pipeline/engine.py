"""The engine that runs stages: skips finished ones, resumes unfinished ones, reruns changed ones.

A stage is identified by a hash of the configuration keys that shape it and of everything it reads.
`started.json` holds the hash from the moment the stage's folder exists and `done.json` once the
stage has finished, so a run may be killed at any moment. `pipeline/stages.py` has the stages.
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

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from uva_jax.runtime import memory
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.guards import end_if_stopped, full_disk_as_user_error, locked, stop_signals
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.settings import shapes_results
from uva_jax.storage.atomic import new_folder, read_json, write_json
from uva_jax.storage.identity import Identity, external_hash, shaping_values


@dataclass(frozen=True)
class Context:
    """The inputs of a stage's `run`.

    Attributes:
      config: the whole configuration; a stage may read only its `config_keys`.
      workdir: the run's folder.
      folder: the stage's own folder, which exists. After an interrupted run it holds what that run
        wrote.
      metrics: the writer of this stage.
      inputs: folder of each stage in `needs` and `derived`.
      is_primary: this process writes; False on the other processes of a multi-host run.
      barrier: waits for all processes; takes a name that is equal on all of them.
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
      name: its name for `--stage`.
      run: does the work and returns metrics that JSON can hold. After an interrupted run it is
        called again in the same folder and should resume.
      needs: names of earlier stages whose folders it reads.
      config_keys: dotted keys that shape the result; a key may name a whole sub-tree.
      folder: where it writes, relative to the workdir; no two stages share one.
      describe: what it does, in a few words.
      fingerprint: from the configuration to the external files or folders it reads, by label. They
        are hashed by content.
      on_request: it runs only if `--stage` names it, or names another such stage that needs it.
      derived: names of further earlier stages that it reads, whose results depend only on `needs`
        and `config_keys`. They run without being named and are no part of this stage's identity.
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

    A finished stage is skipped if its configuration and inputs are unchanged; an unfinished one
    resumes in its folder. A stage whose configuration or inputs have changed, and every stage that
    depends on it, starts over in an empty folder. Each stage ends by writing `done.json`.

    Args:
      stages: the table, each stage after the ones it needs.
      config: the configuration.
      workdir: the run's folder, made if missing.
      only: names of the stages to run; by default all but those `on_request`. Stages that they
        need must be up to date; stages `derived` for them run too.
      is_primary, barrier: for several processes on one shared workdir. Only the primary locks it
        and keeps records; all run the stages and wait at the barriers.

    Raises:
      UserError: a stage is unknown, a needed stage is missing or out of date, or the workdir is
        not writable, used by another run, or on a full disk.
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
        """Returns the identity of a stage's up-to-date result, from configuration and files."""
        if name in self.identities:
            return self.identities[name]
        stage = self.table[name]
        inputs = {need: self.identify(need).hash for need in stage.needs}
        values = shaping_values(self.config.to_dict(), stage.config_keys)
        values = {k: v for k, v in values.items() if shapes_results(k, v)}
        done = read_json(self.folder(name) / "done.json") or {}
        external = stage.fingerprint(self.config) if stage.fingerprint else {}
        for label, path in external.items():
            key = f"file {label}"
            if Path(path).exists():
                inputs[key] = external_hash(path, self.workdir)
            elif done.get("config") == values and key in done["inputs"]:
                inputs[key] = done["inputs"][key]  # a finished stage does not need its file again
            else:
                raise UserError(
                    f"stage {name!r} reads {path} ({label}), which does not exist: check the path "
                    "in the configuration"
                )
        self.identities[name] = Identity(values, inputs)
        return self.identities[name]

    def check_prerequisites(self, chosen: Sequence[str]) -> None:
        """Raises UserError if a needed stage is neither up to date nor chosen."""
        for name in chosen:
            self.identify(name)
        for name in self.table:  # in order, so that the error names the first stage to run
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
                f"--stage {','.join(chosen)} needs stage {name!r}, which {state}: run it first "
                f"with --stage {name}, or leave out --stage to run all missing stages"
            )

    def run(self, name: str) -> dict[str, Any]:
        """Runs, resumes or skips one stage and returns its metrics."""
        end_if_stopped()
        stage, identity, folder = self.table[name], self.identify(name), self.folder(name)
        # Every process reads before the primary changes anything, so that all decide alike.
        done, started = read_json(folder / "done.json"), read_json(folder / "started.json")
        self.barrier(f"{name}:decided")
        if identity.matches(done):
            when = done["finished"][:16].replace("T", " ")
            self.say(f"{name}: skipped, finished {when} in {done['seconds']:.1f} s")
            return done["metrics"]
        resumes = done is None and identity.matches(started)
        clock = time.monotonic()
        memory.restart_peak()
        with MetricsWriter(
            self.workdir, name, config=self.config, fresh=not resumes, enabled=self.is_primary
        ) as writer:
            if self.is_primary and not resumes:
                self._start_afresh(name, done, started)
            verb = "resuming" if resumes else "starting"
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
                    "peak_memory": memory.peak(jax.local_devices()),
                    "resumed": resumes,
                    "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    "versions": _versions(),
                },
            )
        self.barrier(f"{name}:done")
        self.say(f"{name}: finished in {seconds:.1f} s")
        return read_json(folder / "done.json")["metrics"]

    def _start_afresh(self, name: str, done: Mapping | None, started: Mapping | None) -> None:
        """Replaces the stage's folder atomically by one that holds only started.json."""
        # The folder may be a link to another disk: the link stays, its target is replaced.
        folder, identity = self.folder(name).resolve(), self.identify(name)
        if done or started:
            state = "finished" if done else "started"
            changes = identity.changes(done or started)
            self.say(f"{name}: was {state} with other settings or inputs, cleared ({changes})")
        elif left := {p.name for p in folder.iterdir()} if folder.exists() else set():
            if left <= {*self.table[name].unrecorded}:
                self.say(f"{name}: {folder} was written by an earlier version, replaced")
            else:
                raise UserError(
                    f"stage {name!r} writes to {folder}, but it holds files that no stage wrote: "
                    "move them away, or choose another --workdir"
                )
        with new_folder(folder) as new:  # the workdir's lock excludes other writers
            write_json(new / "started.json", {"stage": name, **identity.record()})


def _check_table(stages: Sequence[Stage]) -> dict[str, Stage]:
    table: dict[str, Stage] = {}
    for stage in stages:
        missing = [need for need in (*stage.needs, *stage.derived) if need not in table]
        if missing or stage.name in table or stage.folder in {s.folder for s in table.values()}:
            raise ValueError(
                f"stage {stage.name!r} needs a unique name, a unique folder (not "
                f"{stage.folder!r}), and a place after the stages it needs ({missing} are missing)"
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
