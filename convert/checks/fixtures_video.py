"""Checks I3D and the Fréchet distance against an fvd file in the golden format."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from convert.checks.compare import Checks
from convert.checks.golden import Golden, filled, uniform
from convert.i3d import folded
from uva_jax.eval.frechet import frechet_distance
from uva_jax.models import i3d

_SINGLE = 1e-4  # relative, for distances that the original computed in float32
_DOUBLE = 1e-7  # relative, for those in float64
_FIRST = 8  # stored values of each endpoint
_STATISTICS = "endpoint_mean_std_first8"


def check(golden: Golden, checks: Checks) -> None:
    """Checks preprocessing, every endpoint and the logits of each video, and distances."""
    network = i3d.make(folded(filled(golden.facts["fill"]), golden.name))
    endpoints = jax.jit(lambda network, videos: network.endpoints(videos))
    for name in golden.children(""):
        if f"{name}/logits" not in golden:
            continue
        videos = i3d.preprocess(jnp.asarray(_video(golden, name)))
        key = f"{name}/preprocessed_stride"
        strided = rearrange(videos[:, ::5, ::7, ::7], "b t h w c -> b c t h w")
        checks.compare(key, strided, golden[key], golden.bound(key))
        found = endpoints(network, videos)
        for endpoint in golden.keys(f"{name}/{_STATISTICS}/"):
            values = np.asarray(found[endpoint.rpartition("/")[2]])
            first = rearrange(values, "b t h w c -> b c t h w").reshape(-1)[:_FIRST]
            got = np.array([values.mean(dtype=np.float64), values.std(dtype=np.float64), *first])
            checks.compare(endpoint, got, golden[endpoint], golden.bound(endpoint))
        key = f"{name}/logits"
        checks.compare(key, found["logits"], golden[key], golden.bound(key))
    _distances(golden, checks)


def _video(golden: Golden, name: str) -> np.ndarray:
    """Returns a video (1, t, h, w, 3) uint8: stored, or made by the json's formula."""
    if f"{name}/video_uint8" in golden:
        return golden[f"{name}/video_uint8"]
    formula = golden.facts[name.replace("v", "video")]
    index = int(re.search(r"index (\d+)", formula)[1])
    shape = tuple(map(int, re.search(r"(\d+(?:\*\d+){3}) values", formula)[1].split("*")))
    return np.floor(uniform(index, shape) * 256).astype(np.uint8)[None]


def _distances(golden: Golden, checks: Checks) -> None:
    a, b = golden["frechet/a"], golden["frechet/b"]
    before = a.copy(), b.copy()
    distances = {
        "distance": lambda: frechet_distance(a, b),
        "distance_f64": lambda: frechet_distance(a, b),
        # The original's second call lacks the means, which its first call has subtracted in place.
        "distance_second_call_same_tensors": lambda: frechet_distance(*map(_centred, (a, b))),
        "self_distance": lambda: frechet_distance(a, a),
        "distance_first8dims": lambda: frechet_distance(a[:, :8], b[:, :8]),
    }
    for name, distance in distances.items():
        key = f"frechet/{name}"
        if key not in golden:
            continue
        size = a.var(axis=0).sum() if name == "self_distance" else float(golden[key])
        relative = _DOUBLE if name.endswith("f64") else _SINGLE
        checks.compare(key, np.float64(distance()), golden[key], relative * size)
    # A comparison with the recorded flags would fail: the original changes its inputs.
    golden.used.add("frechet/inputs_modified_in_place")
    changed = [not np.array_equal(*pair) for pair in zip(before, (a, b), strict=True)]
    checks.compare("frechet/inputs_modified (here: none)", np.array(changed), np.zeros(2), 0.0)


def _centred(features: np.ndarray) -> np.ndarray:
    return features - features.mean(axis=0, dtype=np.float64)
