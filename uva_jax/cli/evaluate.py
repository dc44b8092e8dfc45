"""Compares policies in a simulator, on the same seeds and noise:

    python -m uva_jax evaluate --policy embedded --policy runs/tiny/finetune/policy \\
        --seeds 100000:100500 --until-decided --margin .02 --out runs/compared

The first policy is the reference. A policy is a folder, a UVA .ckpt, a .safetensors file,
"embedded", or the address ws://host:port of a policy server that speaks openpi's protocol. The same
command resumes, and one with further seeds or policies reuses the episodes that are there. Of the
policies of a run it takes over the episodes that the run's evaluation has finished with the same
settings.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from uva_jax.runtime.errors import UserError, exit_status
from uva_jax.runtime.guards import full_disk_as_user_error, locked
from uva_jax.runtime.respacing import SAMPLERS
from uva_jax.runtime.sections import (
    LARGEST_SEED,
    SIMULATORS,
    EvaluateOptions,
    no_schedule,
    no_simulator,
)
from uva_jax.runtime.startup import quiet_libraries

# Modules that take seconds to import are imported by the functions that need them.

_GATES = {"better": ("better",), "not-worse": ("better", "not worse")}
_USUAL = EvaluateOptions()
_FAILED = 1  # exit status of a gate that does not pass


def parse_seeds(text: str) -> list[int]:
    """Reads seeds: "100000:100500" (without the last), "1,2,3", or both.

    Raises:
      UserError: the text is something else, or a seed is given twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        try:
            first, colon, last = part.partition(":")
            seeds += range(int(first), int(last)) if colon else [int(first)]
        except ValueError as error:
            raise UserError(
                f"--seeds is {text!r}, but should be like 100000:100500 or 1,2,3"
            ) from error
    if not seeds:
        raise UserError(f"--seeds {text} holds no seed: give at least one")
    if not 0 <= min(seeds) <= max(seeds) <= LARGEST_SEED:
        raise UserError(f"--seeds {text} exceeds 0 to {LARGEST_SEED}")
    if len(set(seeds)) < len(seeds):
        twice = next(seed for i, seed in enumerate(seeds) if seed in seeds[:i])
        raise UserError(f"--seeds {text} holds the seed {twice} twice: give each once")
    return seeds


def parse_gate(text: str | None, margin: float) -> tuple[tuple[str, ...], float]:
    """Returns the verdicts that pass a gate, and its margin; without a gate all verdicts pass.

    Raises:
      UserError: there is no such gate.
    """
    if text is None:
        return (), margin
    name, colon, number = text.partition(":")
    try:
        wanted = float(number) if colon else margin
    except ValueError:
        wanted = -1.0
    if name not in _GATES or not 0 <= wanted < 1 or (colon and name == "better"):
        raise UserError(f"--gate is {text!r}, but should be better, or like not-worse:.02")
    return _GATES[name], wanted


def _choices(text: str, option: str, wrong) -> list[str]:
    """Reads values separated by commas; `wrong(value)` says what is wrong with one, or None."""
    values = [value.strip() for value in text.split(",")]
    for value in values:
        if said := wrong(value):
            raise UserError(f"{option} is {text!r}, but {said}")
    if len(set(values)) < len(values):
        raise UserError(f"{option} {text} holds a value twice: give each once")
    return values


def _no_sampler(name: str) -> str | None:
    return None if name in SAMPLERS else f"samplers are {', '.join(SAMPLERS)}"


def _load(names: Sequence[str], weights: str, precision: str) -> dict:
    """Loads the policies that are no servers.

    Raises:
      UserError: one cannot be loaded or is given twice, or their tasks differ.
    """
    import jax.numpy as jnp

    from uva_jax.eval.server import PREFIXES
    from uva_jax.pipeline.inputs import any_policy

    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"--policy {twice[0]} is given twice: give each once")
    dtype = jnp.bfloat16 if precision == "bfloat16" else None
    policies = {n: any_policy(n, weights, dtype=dtype) for n in names if not n.startswith(PREFIXES)}
    tasks = {name: policy.config.task for name, policy in policies.items()}
    for name, task in tasks.items():
        first = next(iter(tasks))
        if task != tasks[first]:
            raise UserError(
                f"{first} is a policy of the task {tasks[first]} and {name} one of {task}: compare "
                "policies of one task"
            )
    return policies


def _simulator(args: argparse.Namespace, policies: Mapping) -> str:
    """Returns the simulator's name, by default that of the policies' task.

    Raises:
      UserError: there is none for the task, or its name is wrong.
    """
    task = next((policy.config.task for policy in policies.values()), "")
    name = args.simulator or (task if task in SIMULATORS else "")
    if not name:
        of = f"the task {task}" if task else "a policy server"
        raise UserError(
            f"no simulator is known for {of}: give --simulator, which can be "
            f"{', '.join(SIMULATORS)} or a class as package.module:Class"
        )
    if wrong := no_simulator(name):
        raise UserError(f"--simulator is {name!r}, but {wrong}")
    return name


def _entrants(args: argparse.Namespace, policies: Mapping, pool, stack) -> list:
    """Returns an entrant for each policy and way of sampling.

    Raises:
      UserError: a policy cannot act in the simulator, or a server does not answer.
    """
    from uva_jax.data.language import task_latents
    from uva_jax.eval.acting import LocalPolicy
    from uva_jax.eval.compare import Entrant
    from uva_jax.eval.server import ServerPolicy
    from uva_jax.models.policy_config import steps_of
    from uva_jax.models.surgery import policy_hash

    all_steps = _choices(args.sampling_steps, "--sampling-steps", no_schedule)
    samplers = _choices(args.sampler, "--sampler", _no_sampler)
    found = []
    for source in args.policy:
        if source not in policies:
            renamed = dict(pair.split("=", 1) for pair in args.observation)
            policy = ServerPolicy(
                source,
                pool.simulator,
                observation=renamed,
                action_steps=args.action_steps,
                max_steps=args.max_steps,
            )
            settings = {"policy": source, "observation": renamed, "action_steps": args.action_steps}
            settings |= {"max_steps": args.max_steps, "noise_seed": args.noise_seed}
            settings["metadata"] = json.loads(json.dumps(policy.metadata, default=str))
            stack.enter_context(policy)
            found.append(Entrant(source, source, policy, settings | pool.settings))
            continue
        policy = policies[source]
        content = {"policy_hash": policy_hash(policy)}
        ways = {}  # a head of few evaluations has its own steps and sampler
        for steps in all_steps:
            for sampler in samplers:
                own = steps_of(policy.config.action_head, steps) if policy.action_head else steps
                few = getattr(policy.config.action_head, "few_steps", False)
                ways.setdefault((own, samplers[0] if few else sampler), steps)
        for own, sampler in ways:
            more = [f"{own} steps"] * (len({s for s, _ in ways}) > 1)
            more += [sampler] * (len({s for _, s in ways}) > 1)
            label = ", ".join([source, *more])
            actor = LocalPolicy(
                source,
                policy,
                pool.simulator,
                sampling_steps=own,
                sampler=sampler,
                noise_seed=args.noise_seed,
                max_steps=args.max_steps,
                language=functools.partial(
                    task_latents, path=args.language, vocabulary=args.vocabulary
                ),
            )
            found.append(Entrant(label, source, actor, content | actor.settings | pool.settings))
    return found


def _take_finished(comparison, policies: Mapping, seeds: Sequence[int], metrics) -> None:
    """Adds those of the seeds that the evaluation in a policy folder's own run has finished."""
    from uva_jax.eval.evaluate import FOLDER, finished_episodes
    from uva_jax.pipeline.inputs import policy_path

    for entrant in comparison.entrants:
        if entrant.policy in policies:
            folder = policy_path(entrant.policy).absolute().parent.parent / FOLDER
            finished = finished_episodes(folder, entrant.identity, seeds)
            if count := comparison.scores[entrant.label].add(*finished):
                metrics.say(f"{entrant.label}: {count} episodes are taken from {folder}")


def run(args: argparse.Namespace) -> int:
    """Rolls out, prints the table and the verdicts, and writes results.json and report.html.

    Returns:
      0, or 1 if there is a gate that a policy does not pass.

    Raises:
      UserError: an option is wrong, or the policies do not fit each other or the simulator.
    """
    seeds, (passing, margin) = parse_seeds(args.seeds), parse_gate(args.gate, args.margin)
    out = Path(args.out).expanduser()
    for option in ("draws", "slots", "max_steps", "action_steps"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} should be at least 1")
    if wrong := [pair for pair in args.observation if "=" not in pair]:
        raise UserError(
            f"--observation is {wrong[0]!r}, but should be like observation/image=image"
        )
    if not 0 <= margin < 1:
        raise UserError(f"--margin is {margin:g}, but should be at least 0 and below 1")
    args.out = out
    policies = _load(args.policy, args.weights, args.precision)
    name = _simulator(args, policies)

    from uva_jax.envs.workers import WorkerError
    from uva_jax.eval.compare import Comparison, table
    from uva_jax.eval.compare_report import write_comparison_report
    from uva_jax.eval.rollout import RolloutPool
    from uva_jax.runtime.metrics import MetricsWriter
    from uva_jax.storage.atomic import write_json

    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(out, print))
        stack.enter_context(full_disk_as_user_error(out))
        metrics = stack.enter_context(MetricsWriter(out, "evaluate"))
        pool = RolloutPool(args.workers or None, simulator=name, files=args.simulator_files)
        stack.enter_context(pool)
        entrants = _entrants(args, policies, pool, stack)
        if len(entrants) < 2 and (args.gate or args.until_decided):
            raise UserError("a verdict compares policies: give --policy twice or more")
        comparison = Comparison(
            entrants, pool, out / "episodes", metrics, draws=args.draws, slots=args.slots
        )
        _take_finished(comparison, policies, seeds, metrics)
        # A round has a slow end, in which ever fewer slots are full.
        size = 2 * args.slots if args.until_decided else len(seeds)
        for stop in range(size, len(seeds) + size, size):
            done = seeds[:stop]
            try:
                comparison.roll_out(done)
            except WorkerError as error:
                raise UserError(f"{error}; the seeds that are done are kept") from error
            figures = comparison.figures(done)
            verdicts = comparison.verdicts(figures, margin)
            results = {"seeds": done, "draws": args.draws}
            results |= {"policies": figures, "comparisons": verdicts}
            write_json(out / "results.json", results)
            for row in verdicts:
                metrics.say(row["verdict"]["sentence"])
            if all(row["verdict"]["kind"] != "undecided" for row in verdicts):
                break
    print(table(figures, verdicts))
    failed = [row for row in verdicts if passing and row["verdict"]["kind"] not in passing]
    for row in failed:
        print(f"the gate {args.gate} fails: {row['verdict']['sentence']}")
    report = write_comparison_report(out / "report.html", results)
    print(f"wrote {out / 'results.json'} and {report}", flush=True)
    return _FAILED if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m uva_jax evaluate",
        description="Compares policies in a simulator, on the same seeds and noise.",
    )
    add = parser.add_argument
    add(
        "--policy",
        action="append",
        required=True,
        help="a policy folder, a UVA .ckpt, a .safetensors, 'embedded' or ws://host:port; the "
        "first is the reference",
    )
    add(
        "--out", required=True, metavar="DIR", help="folder of scores, results.json and report.html"
    )
    add("--seeds", default="100000:100050", help="like 100000:100050 (default) or 1,2,3")
    add("--draws", type=int, default=1, metavar="N", help="noises for each seed (default: 1)")
    add("--sampling-steps", default="", help="like 100,20,5 (default: the policy's)")
    add("--sampler", default=SAMPLERS[0], help=f"one or several of {','.join(SAMPLERS)}")
    add("--simulator", default="", help="its name, or package.module:Class (default: by task)")
    add("--simulator-files", default="", metavar="PATH", help="what the simulator reads")
    add("--max-steps", type=int, default=_USUAL.max_steps, metavar="N", help="of an episode")
    add("--margin", type=float, default=0.02, help="accepted loss of score (default: .02)")
    add("--until-decided", action="store_true", help="stop as soon as the verdict is certain")
    add("--gate", help="exit with status 1 unless every policy is better, or not-worse:.02")
    add("--weights", default="ema", help="weights of a .ckpt: ema or model (default: ema)")
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of matrix products (default: float32; runs on GPUs and TPUs use bfloat16)",
    )
    add("--noise-seed", type=int, default=0, help="of the samplers' noise (default: 0)")
    add("--slots", type=int, default=_USUAL.slots, help="episodes that run at a time")
    add("--workers", type=int, default=0, help="simulator processes (default: one per core)")
    add("--language", default="", metavar="FILE", help="language latents by task")
    add("--vocabulary", default="", metavar="DIR", help="CLIP's, for a policy's language tower")
    add(
        "--observation",
        action="append",
        default=[],
        metavar="NAME=KEY",
        help="servers: send the simulator's KEY as NAME (default: all arrays as they are)",
    )
    add("--action-steps", type=int, default=8, help="servers: actions per call (default: 8)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input prints one sentence on stderr and returns status 2."""
    quiet_libraries()
    args = _parser().parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
