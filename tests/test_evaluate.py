"""`python -m uva_jax evaluate`: the pipeline's scores, resuming, servers, gates and bad input."""

import json
import shlex
import shutil
import threading
from types import SimpleNamespace

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from line_world import Reacher
from variants import VARIANTS
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from uva_jax.cli.evaluate import main, parse_gate, parse_seeds
from uva_jax.envs.simulator import SimulatorInfo
from uva_jax.envs.workers import WorkerError
from uva_jax.eval import compare, evaluate, server
from uva_jax.eval.acting import LocalPolicy
from uva_jax.eval.rollout import RolloutPool, spec_of
from uva_jax.eval.statistics import PRACTICABLE, verdict
from uva_jax.models import policy_folder, surgery
from uva_jax.pipeline import inputs
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import EvaluateOptions


def openpi_pack(message):
    """Packs as openpi's msgpack_numpy does."""

    def array(x):
        if isinstance(x, np.ndarray):
            kind = {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str}
            return kind | {b"shape": x.shape}
        return x

    return msgpack.packb(message, default=array)


def openpi_unpack(data):
    def array(x):
        if b"__ndarray__" in x:
            return np.ndarray(x[b"shape"], np.dtype(x[b"dtype"]), x[b"data"])
        return x

    return msgpack.unpackb(data, object_hook=array)


class Server:
    """A policy server as openpi's, which dies after a number of calls; a context manager."""

    def __init__(self, infer, calls=10**9):
        self.infer, self.left, self.seen = infer, calls, []

    def _handle(self, connection):
        connection.send(openpi_pack({"robot": "line"}))
        try:
            while True:
                obs = openpi_unpack(connection.recv())
                self.seen.append(obs)
                self.left -= 1
                if self.left < 0:
                    return
                answer = self.infer(obs)
                text = isinstance(answer, str)
                connection.send(answer if text else openpi_pack({"actions": answer}))
        except ConnectionClosed:
            pass

    def __enter__(self):
        self._server = serve(self._handle, "127.0.0.1", 0, compression=None, max_size=None)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        port = self._server.socket.getsockname()[1]
        self.address = f"ws://127.0.0.1:{port}"
        return self

    def __exit__(self, *_):
        self._server.shutdown()


def approach(obs, share=0.5):
    """Goes a share of the way to the goal in each of 4 steps."""
    goal = float(obs["image"][0, 0, 0])
    return np.full((4, 1), (goal - obs["position"][0]) * share / 4, np.float32)


REACHER = ["--simulator", "line_world:Reacher", "--workers", "1", "--action-steps", "4"]


def results(out):
    return json.loads((out / "results.json").read_text())


def test_the_command_gives_the_pipelines_scores_and_reuses_its_episodes(
    finished, tmp_path, capsys, monkeypatch
):
    first = json.loads((finished.workdir / "eval" / "metrics.json").read_text())
    teacher, copy = finished.workdir / "teacher" / "policy", tmp_path / "copy"
    shutil.copytree(teacher, copy)
    out, command = tmp_path / "out", ["--sampling-steps", "4", "--max-steps", "16"]
    command += ["--policy", str(teacher), "--policy", str(copy), "--workers", "1"]
    command += ["--out", str(out)]
    assert main([*command, "--seeds", "100000:100002"]) == 0
    found = results(out)
    assert found["policies"][0]["scores"] == first["teacher"]["scores"]
    (compared,) = found["comparisons"]
    assert compared["paired_difference"] == 0 and compared["mcnemar"] == 1
    assert compared["verdict"]["kind"] == "undecided" and compared["verdict"]["seeds_needed"]
    shown = capsys.readouterr().out
    assert "more would" in shown and "score  95% interval" in shown
    assert main([*command, "--seeds", "100000:100002", "--gate", "not-worse:.02"]) == 1
    assert "the gate not-worse:.02 fails: " in capsys.readouterr().out
    again = results(out)
    assert again == found  # nothing was rolled out: even the times are those of the first run


@pytest.fixture
def played(monkeypatch):
    """The seeds of each call of `RolloutPool.run`."""
    calls, play = [], RolloutPool.run

    def run(pool, predict, seeds, **options):
        calls.append(list(seeds))
        return play(pool, predict, seeds, **options)

    monkeypatch.setattr(RolloutPool, "run", run)
    return calls


def test_the_command_that_a_run_prints_goes_on_with_the_runs_episodes(
    finished, tmp_path, capsys, played
):
    (line,) = (x for x in finished.printed.splitlines() if "python -m uva_jax evaluate" in x)
    command = shlex.split(line.partition("python -m uva_jax evaluate ")[2])
    for option, value in (("--seeds", "100000:100003"), ("--out", str(tmp_path / "out"))):
        command[command.index(option) + 1] = value
    command += ["--workers", "1"]
    first = json.loads((finished.workdir / "eval" / "metrics.json").read_text())
    assert main(command) == 0
    said = capsys.readouterr().out
    assert played == [[100_002]] * 2
    for row, name, folder in zip(
        results(tmp_path / "out")["policies"],
        ("teacher", "graft"),
        ("teacher", "finetune"),
        strict=True,
    ):
        policy = finished.workdir / folder / "policy"
        assert f"{policy}: 2 episodes are taken from {finished.workdir / 'eval'}" in said
        assert row["scores"][:2] == first[name]["scores"]
        assert row["steps"][:2] == first[name]["steps"]
        assert row["seconds"] > first[name]["seconds"]
    assert main(command) == 0
    assert len(played) == 2 and "are taken" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed",
    [
        ["--noise-seed", "1"],
        ["--sampling-steps", "5"],
        ["--sampler", "ddim"],
        ["--max-steps", "8"],
        ["--precision", "bfloat16"],
        ["--simulator", "pusht_multitask"],
        ["--draws", "2"],
        ["another policy"],
    ],
)
def test_episodes_of_other_settings_or_another_policy_are_not_taken(
    changed, finished, tmp_path, capsys, monkeypatch
):
    calls = []

    def stop(pool, predict, seeds, **options):
        calls.append(list(seeds))
        raise WorkerError("stopped")

    monkeypatch.setattr(RolloutPool, "run", stop)
    policy = tmp_path / "teacher" / "policy"
    shutil.copytree(finished.workdir / "eval", tmp_path / "eval")
    if changed == ["another policy"]:
        changed, before = [], policy_folder.load_policy(finished.workdir / "teacher" / "policy")
        arrays = surgery.flatten(before)
        arrays["normalizer/action/offset"] += 1e-6
        policy_folder.save_policy(policy, surgery.replace(before, arrays), source={})
    else:
        shutil.copytree(finished.workdir / "teacher" / "policy", policy)
    command = ["--policy", str(policy), "--sampling-steps", "4", "--max-steps", "16"]
    command += ["--seeds", "100000:100002", "--workers", "1", "--out", str(tmp_path / "out")]
    assert main([*command, *changed]) == 2
    said = capsys.readouterr().out
    assert calls == [[100_000, 100_001]]
    # The first of two draws has the noise of the run's episodes.
    assert ("2 episodes are taken from" in said) == ("--draws" in changed)


def test_of_a_finished_evaluation_only_the_wanted_seeds_are_taken(finished):
    folder = finished.workdir / "eval"
    identity = json.loads((folder / "teacher.json").read_text())["identity"]
    whole, times = evaluate.finished_episodes(folder, identity, [100_000, 100_001])
    part, share = evaluate.finished_episodes(folder, identity, [5, 100_001])
    assert [seed for seed, _ in whole] == [100_000, 100_001]
    assert list(part.items()) == list(whole.items())[1:]
    assert share == pytest.approx([t / 2 for t in times])
    assert not evaluate.finished_episodes(folder, "another", [100_000])[0]


@pytest.mark.parametrize(
    ("spread", "mean", "seeds"),
    [(0.05, 0.0, "more than is needed"), (0.3, -0.005, "all"), (0.3, -0.0199, "too close")],
)
def test_an_undecided_verdict_asks_for_a_practicable_number_of_seeds(spread, mean, seeds, capsys):
    gain = np.random.default_rng(0).normal(0, spread, 50)
    found = verdict(gain - gain.mean() + mean, 0.02).as_json()
    say = SimpleNamespace(say=print)
    more = {"precision": "bfloat16", "language": ""}
    evaluate.say_verdict(found, ["a", "b"], "out", EvaluateOptions(slots=8), say, more)
    sentence, command = capsys.readouterr().out.splitlines()
    assert sentence == found["sentence"] and found["kind"] == "undecided"
    assert command.endswith(" --simulator pusht --slots 8 --precision bfloat16 --out out")
    count = len(parse_seeds(command.partition("--seeds ")[2].split()[0]))
    needed = found["seeds_needed"]
    if seeds == "more than is needed":
        assert 2 * (50 + needed) <= count < 2 * (50 + needed) + 100
        assert "until it is decided: " in command
    else:
        assert 50 + PRACTICABLE <= count < 50 + PRACTICABLE + 100
        assert (needed is None) == (seeds == "too close")
        assert ("all the same, for a narrower interval: " in command) == (needed is None)


def test_a_server_gets_observations_and_gives_chunks(tmp_path, capsys):
    with Server(approach) as good, Server(lambda obs: approach(obs, 0.1)) as bad:
        command = ["--policy", good.address, "--policy", bad.address, *REACHER, "--slots", "4"]
        command += ["--seeds", "0:400", "--max-steps", "16", "--out", str(tmp_path)]
        assert main([*command, "--until-decided", "--gate", "not-worse:.02"]) == 1
        found = results(tmp_path)
        assert found["comparisons"][0]["verdict"]["kind"] == "worse"
        assert len(found["seeds"]) % 8 == 0 and len(found["seeds"]) < 400
        assert found["policies"][0]["mean"] > 0.9 and found["policies"][1]["mean"] < 0.5
        obs = good.seen[0]
        assert obs["prompt"] == "reach the goal" and obs["position"].dtype == np.float32
        assert obs["image"].shape == (8, 8, 3) and obs["image"].dtype == np.uint8
    assert "is worse than" in capsys.readouterr().out


def test_the_seeds_that_are_done_are_kept_when_a_server_dies(tmp_path, capsys):
    command = [*REACHER, "--slots", "2", "--max-steps", "8", "--seeds", "0:6", "--draws", "2"]
    names = ["--observation", "observation/state=position", "--observation", "pic=image"]

    def infer(obs):
        assert obs.keys() == {"observation/state", "pic", "prompt"}
        return approach({"image": obs["pic"], "position": obs["observation/state"]})

    with Server(infer, calls=9) as dying:
        address = dying.address
        command += ["--policy", address, "--out", str(tmp_path), *names]
        assert main(command) == 2
    said = capsys.readouterr().err
    assert f"the policy server {address} cannot be reached" in said and said.count("\n") == 1
    assert "the seeds that are done are kept" in said
    (file,) = (tmp_path / "episodes").glob("*.jsonl")
    kept = file.read_text().splitlines()
    assert 0 < len(kept) < 12
    port = int(address.rpartition(":")[2])
    healthy = Server(infer)
    healthy_serve = serve(healthy._handle, "127.0.0.1", port, compression=None, max_size=None)
    with healthy_serve as again:
        threading.Thread(target=again.serve_forever, daemon=True).start()
        assert main(command) == 0
    assert file.read_text().splitlines()[: len(kept)] == kept
    assert len(results(tmp_path)["policies"][0]["scores"]) == 6


@pytest.mark.parametrize(
    ("infer", "message"),
    [
        (lambda obs: "Traceback ...\nKeyError: 'state'\n", "failed: KeyError: 'state'"),
        (lambda obs: np.zeros((2, 1)), r"actions of shape \(2, 1\), but 4 actions of 1 numbers"),
        (lambda obs: np.full((4, 1), np.nan), "returned actions of nan or inf"),
    ],
)
def test_answers_that_are_no_actions_are_explained(infer, message):
    info = SimulatorInfo("line", Reacher.observes, 1, Reacher.tasks)
    obs = {"image": np.zeros((1, 1, 8, 8, 3), np.uint8), "position": np.zeros((1, 1, 1))}
    numbers = np.zeros(1, np.int32)
    with Server(infer) as running:
        with server.ServerPolicy(running.address, info, action_steps=4) as policy:
            assert policy.metadata == {"robot": "line"}
            with pytest.raises(UserError, match=message):
                policy(obs | {"task": numbers}, numbers, numbers, numbers)
            with pytest.raises(UserError, match="lacks wrist_image"):
                server.ServerPolicy(running.address, info, observation={"a": "wrist_image"})


def test_noise_depends_on_the_seed_alone_and_is_that_of_the_pipeline():
    assert [compare.noise_number(100_000 + i, 0) for i in range(3)] == [0, 1, 2]
    numbers = {compare.noise_number(seed, draw) for seed in range(2000) for draw in range(8)}
    assert len(numbers) == 16_000 and min(numbers) >= 0 and max(numbers) < 2**31


def test_seeds_and_gates_are_read():
    assert parse_seeds("5,1:3") == [5, 1, 2]
    assert parse_gate("not-worse:.05", 0.02) == (("better", "not worse"), 0.05)
    assert parse_gate("not-worse", 0.02)[1] == 0.02 and parse_gate("better", 0.02)[0] == ("better",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1:5,3"], "holds the seed 3 twice"),
        (["--seeds", "1-5"], "should be like 100000:100500"),
        (["--seeds", "5:5"], "holds no seed"),
        (["--seeds=-3"], "exceeds 0 to"),
        (["--gate", "good"], "--gate is 'good', but should be better, or like not-worse:.02"),
        (["--gate", "not-worse:2"], "--gate is 'not-worse:2'"),
        (["--margin", "-1"], "--margin is -1"),
        (["--draws", "0"], "--draws should be at least 1"),
        (["--policy", "a.ckpt"], "--policy a.ckpt is given twice"),
        (["--policy", "b.ckpt"], "a.ckpt is a policy of the task pusht and b.ckpt one of libero10"),
        (["--simulator", "nosuch"], "--simulator is 'nosuch', but can be 'pusht'"),
    ],
)
def test_bad_options_are_one_sentence(options, message, tmp_path, capsys, monkeypatch):
    tasks = {"a.ckpt": "pusht", "b.ckpt": "libero10"}

    def load(name, weights, dtype):
        return SimpleNamespace(config=SimpleNamespace(task=tasks[name]))

    monkeypatch.setattr(inputs, "any_policy", load)
    assert main(["--policy", "a.ckpt", "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_not_there_is_one_sentence(tmp_path, capsys):
    command = ["--policy", "ws://127.0.0.1:9", "--out", str(tmp_path)]
    assert main(command) == 2
    assert "no simulator is known for a policy server: give --simulator" in capsys.readouterr().err
    assert main([*command, *REACHER]) == 2
    assert "the policy server ws://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


def test_a_simulator_that_lacks_what_a_policy_reads_is_named():
    policy = surgery.abstract_policy(VARIANTS["everything"])
    info = SimulatorInfo("pusht", {"image": (96, 96, 3), "agent_pos": (2,)}, 2, ())
    with pytest.raises(UserError, match="lacks wrist_image, robot0_.*, which the graft reads; it"):
        LocalPolicy("the graft", policy, info)


def test_scores_depend_on_the_language_latents():
    policy = surgery.abstract_policy(VARIANTS["everything"])
    names = spec_of(policy.config).names
    info = SimulatorInfo("all", dict.fromkeys(names, (1,)), policy.config.action_dim, ("a task",))

    def settings(value):
        def language(tasks, policy):
            return np.full((len(tasks), policy.config.mar.text_dim), value, np.float32)

        return LocalPolicy("the graft", policy, info, language=language).settings

    assert "text_latents" in names
    assert settings(1.0) == settings(1.0) != settings(2.0)


def test_a_checkpoint_is_loaded_in_another_precision_with_the_same_arrays(checkpoint):
    full, half = (inputs.any_policy(str(checkpoint), dtype=x) for x in (None, jnp.bfloat16))
    assert full.dtype is None
    assert half.dtype == half.mar.decoder_embed.dtype == jnp.bfloat16
    assert surgery.policy_hash(full) == surgery.policy_hash(half)
