"""Films of the episodes in which two policies differ most."""

from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from uva_jax.envs.episode import RolloutSpec
from uva_jax.eval.recall import Recalled, film, most_different
from uva_jax.eval.rollout import EMPTY, RolloutPool

SEEDS = [100_000, 100_001, 100_002, 100_003, 100_004]
SPEC = RolloutSpec(names=("image",), max_steps=24)


class Wandering:
    """A policy with random actions of each episode and call; counts its calls."""

    def __init__(self, key):
        self.spec, self.calls, self._key = SPEC, 0, key

    def __call__(self, obs, seed_index, call_index, slots):
        self.calls += 1
        rngs = [
            np.random.default_rng([self._key, int(i) + 1, int(call)])
            for i, call in zip(seed_index, call_index, strict=True)
        ]
        return np.stack([rng.uniform(0, 512, (8, 2)) for rng in rngs])


@pytest.fixture(scope="module")
def pool():
    with RolloutPool(1) as pool:
        yield pool


def frames(path):
    return np.stack(imageio.mimread(path, memtest=False)).astype(int)


def test_the_largest_differences_come_first_whatever_their_sign():
    assert most_different([1, 1, 0.5, 1, 0], [1, 0.2, 0.6, 1, 1], 3) == [4, 1, 2]
    assert most_different([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 2) == [0, 1]
    assert most_different([1.0], [0.0], 4) == [0]


def test_chosen_episodes_are_played_again_without_the_policy(pool, tmp_path):
    actors = {name: Recalled(Wandering(key)) for key, name in enumerate(("teacher", "graft"))}
    first = {name: pool.run(actor, SEEDS, spec=SPEC) for name, actor in actors.items()}
    called = [actor._actor.calls for actor in actors.values()]
    film(pool, actors, SEEDS, [3, 1], slots=32, folder=tmp_path)
    assert [actor._actor.calls for actor in actors.values()] == called
    names = [f"seed_{seed}.{kind}" for seed in (100_001, 100_003) for kind in ("mp4", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    again = pool.run(actors["graft"], [SEEDS[3]], numbers=[3], spec=SPEC, record_seeds=[SEEDS[3]])
    assert again.scores[0] == first["graft"].scores[3]
    shown, filmed = frames(tmp_path / "seed_100003.mp4"), again.videos[SEEDS[3]]
    # The right half shows the graft at twice its size, above a caption.
    right = shown[:, -192:, -192:][:, ::2, ::2]
    assert len(right) == len(filmed) and np.abs(right - filmed).mean() < 8
    strip = np.asarray(Image.open(tmp_path / "seed_100003.png")).astype(int)
    assert np.abs(strip[:, -shown.shape[2] :] - shown[-1]).mean() < 8  # it ends with the last frame


def test_after_an_interruption_the_policy_is_called_again(pool, tmp_path):
    whole, cut = (Recalled(Wandering(5)) for _ in range(2))
    pool.run(whole, SEEDS, spec=SPEC)
    for name, actor in (("whole", whole), ("cut", cut)):
        film(pool, {"teacher": actor}, SEEDS, [2], slots=32, folder=tmp_path / name)
    assert cut._actor.calls > 0
    videos = [(tmp_path / name / "seed_100002.mp4").read_bytes() for name in ("whole", "cut")]
    assert videos[0] == videos[1]
    calls = cut._actor.calls
    film(pool, {"teacher": Recalled(cut._actor)}, SEEDS, [2], slots=32, folder=tmp_path / "cut")
    assert cut._actor.calls == calls  # the film is there


def test_an_empty_row_is_no_reason_to_call_the_policy():
    policy = Recalled(SimpleNamespace(spec=SPEC))  # cannot be called
    policy._actions = {(4, 0): np.full((8, 2), 7.0)}
    found = policy({}, np.array([EMPTY, 4]), np.array([0, 0]), 0)
    assert found.shape == (2, 8, 2) and (found[1] == 7).all() and (found[0] == 0).all()
