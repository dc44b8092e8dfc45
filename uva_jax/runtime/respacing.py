"""The timesteps that a respaced diffusion process keeps, from text such as "10" or "ddim50".

The module does without jax, because checking a configuration uses it too.
"""

from __future__ import annotations

import math

from uva_jax.runtime.errors import UserError

SAMPLERS = ("ancestral", "ddim", "dpm++")
# Of the process that sampling respaces, as in the original: also for heads that learn another one.
TRAIN_STEPS = 1000


def space_timesteps(num_steps: int, respacing: str) -> list[int]:
    """Returns the timesteps of the original process that a respaced one keeps, in rising order.

    Args:
      num_steps: length of the original process.
      respacing: "" (all), "N", "N1,N2,..." (evenly spaced steps in each of equal sections),
        "ddimN" (one stride throughout), or "logsnrN" (the last step, and evenly spaced logarithms
        of the signal-to-noise ratio: for 10 steps of the sampler dpm++, or more).

    Raises:
      UserError: the text is malformed, or the process cannot be divided that way.
    """
    if respacing == "":
        return list(range(num_steps))
    if respacing.startswith("logsnr") and respacing.removeprefix("logsnr").isdecimal():
        return _evenly_in_log_snr(num_steps, int(respacing.removeprefix("logsnr")))
    ddim = respacing.startswith("ddim")
    parts = [part.strip() for part in respacing.removeprefix("ddim").split(",")]
    if not all(part.isdecimal() and int(part) for part in parts) or (ddim and len(parts) > 1):
        raise UserError(
            f"{respacing!r} is no number of sampling steps: give a number such as '10', one for "
            "each section such as '10,20', 'ddim50' or 'logsnr10'"
        )
    counts = [int(part) for part in parts]
    if ddim:
        for stride in range(1, num_steps):
            if len(range(0, num_steps, stride)) == counts[0]:
                return list(range(0, num_steps, stride))
        raise UserError(
            f"no integer stride gives {counts[0]} DDIM steps out of {num_steps}: use another number"
        )
    size, extra = divmod(num_steps, len(counts))
    kept, start = set(), 0
    for i, count in enumerate(counts):
        section = size + (i < extra)
        if section < count:
            raise UserError(
                f"a section of {section} diffusion steps cannot give {count} steps: ask for fewer"
            )
        stride = (section - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # accumulated, not multiplied, to round as the original does
            kept.add(start + round(position))
            position += stride
        start += section
    return sorted(kept)


def _evenly_in_log_snr(num_steps: int, count: int) -> list[int]:
    """Returns the last timestep, and others whose log signal-to-noise ratios are evenly spaced.

    Those of the last 2 % of the cosine process change so fast that they would take most steps, but
    x hardly depends on the data there.
    """

    def log_snr(i: int) -> float:
        bar = (_cosine((i + 1) / num_steps) / _cosine(0.0)) ** 2
        return math.log(bar / (1.0 - bar))

    levels = [log_snr(i) for i in range(num_steps - 1)]  # falling
    high, low = levels[0], levels[int(0.98 * num_steps)]
    kept = {num_steps - 1}
    for j in range(count - 1):
        wanted = low + (high - low) * j / max(count - 2, 1)
        distances = [abs(level - wanted) for level in levels]
        kept.add(distances.index(min(distances)))
    if len(kept) != count:
        raise UserError(
            f"{count} of {num_steps} diffusion steps cannot be spaced evenly in log SNR: ask for "
            "fewer, and at least 1"
        )
    return sorted(kept)


def _cosine(u: float) -> float:
    """The square root of the cosine process's alpha-bar at u in 0..1, but for a factor."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2)
