"""The timesteps that a respaced diffusion process keeps, from text such as "10" or "ddim50".

The module does without jax, because checking a configuration uses it too.
"""

from __future__ import annotations

from uva_jax.runtime.errors import UserError

SAMPLERS = ("ancestral", "ddim", "dpm++")
TRAIN_STEPS = 1000  # of the process that UVA's heads learn


def space_timesteps(num_steps: int, respacing: str) -> list[int]:
    """Returns the timesteps of the original process that a respaced one keeps, in rising order.

    Args:
      num_steps: length of the original process.
      respacing: "" (all), "N", "N1,N2,..." (evenly spaced steps in each of equal sections), or
        "ddimN" (one stride throughout).

    Raises:
      UserError: the text is malformed, or the process cannot be divided that way.
    """
    if respacing == "":
        return list(range(num_steps))
    ddim = respacing.startswith("ddim")
    parts = [part.strip() for part in respacing.removeprefix("ddim").split(",")]
    if not all(part.isdecimal() and int(part) for part in parts) or (ddim and len(parts) > 1):
        raise UserError(
            f"{respacing!r} is no number of sampling steps: give a number such as '10', one for "
            "each section such as '10,20', or 'ddim50'"
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
