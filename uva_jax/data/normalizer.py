"""Linear normalisation of low-dimensional fields, as UVA fits and stores it.

A normaliser consists of plain arrays, so that it can be saved, converted and passed through jit:
`{field: {"scale": (d,), "offset": (d,), "input_stats": {"min", "max", "mean", "std"}}}`, float32.
Normalised values are `x * scale + offset`. The functions work on numpy and on jax arrays.
"""

from collections.abc import Mapping

import numpy as np

from uva_jax.runtime.errors import UserError

Field = Mapping[str, object]  # scale, offset, input_stats


def fit_field(
    data: np.ndarray,
    *,
    mode: str = "limits",
    output_max: float = 1.0,
    output_min: float = -1.0,
    range_eps: float = 1e-4,
    fit_offset: bool = True,
) -> dict:
    """Fits one field to data (..., d) over all leading axes.

    `limits` maps each column's range to [output_min, output_max] or, without `fit_offset`, its
    largest magnitude to the smaller of the bounds' magnitudes. `gaussian` divides by the unbiased
    standard deviation and, with `fit_offset`, centres. Columns that vary by less than `range_eps`
    keep their scale; `limits` with an offset moves them to the middle of the output range.

    Raises:
      ValueError: the mode is unknown, or the output range is empty.
      UserError: the data are not finite or have fewer than two rows.
    """
    if mode not in ("limits", "gaussian"):
        raise ValueError(f'mode must be "limits" or "gaussian", got {mode!r}')
    if not output_min < output_max or (not fit_offset and not output_min < 0 < output_max):
        raise ValueError(
            f"the output range {output_min}..{output_max} must not be empty, and must hold 0 "
            "inside when no offset is fitted"
        )
    rows = np.asarray(data, np.float32)
    rows = rows.reshape(-1, rows.shape[-1])
    if len(rows) < 2 or not np.isfinite(rows).all():
        raise UserError(
            f"a normaliser needs at least two rows of finite numbers, got {len(rows)} rows"
            + ("" if np.isfinite(rows).all() else ", some of them not finite")
        )
    low, high = rows.min(axis=0), rows.max(axis=0)
    # Sums in float64, so that the statistics do not depend on the order of summation.
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    std = rows.std(axis=0, dtype=np.float64, ddof=1).astype(np.float32)
    top, bottom = np.float32(output_max), np.float32(output_min)
    if mode == "gaussian":
        scale = 1 / np.where(std < range_eps, np.float32(1), std)
        offset = -mean * scale if fit_offset else np.zeros_like(mean)
    elif fit_offset:
        constant = high - low < range_eps
        scale = (top - bottom) / np.where(constant, top - bottom, high - low)
        offset = np.where(constant, (top + bottom) / 2 - low, bottom - scale * low)
    else:
        reach = min(abs(top), abs(bottom))
        magnitude = np.maximum(np.abs(low), np.abs(high))
        scale = reach / np.where(magnitude < range_eps, reach, magnitude)
        offset = np.zeros_like(mean)
    stats = {"min": low, "max": high, "mean": mean, "std": std}
    return {
        "scale": scale.astype(np.float32),
        "offset": offset.astype(np.float32),
        "input_stats": stats,
    }


def fit(data: Mapping[str, np.ndarray], **options) -> dict:
    """Fits every field of `data`, each (..., d); options as for `fit_field`."""
    return {name: fit_field(values, **options) for name, values in data.items()}


def image_field() -> dict:
    """Returns the field that UVA stores for images in 0..1, but does not apply."""
    stats = {"min": 0, "max": 1, "mean": 0.5, "std": np.sqrt(1 / 12)}
    return {
        "scale": np.array([2], np.float32),
        "offset": np.array([-1], np.float32),
        "input_stats": {name: np.array([value], np.float32) for name, value in stats.items()},
    }


def normalize(x, field: Field):
    """Normalises x (..., d) in the field's units; float32."""
    x, scale, offset = _operands(x, field)
    return x * scale + offset


def unnormalize(x, field: Field):
    """Converts normalised x (..., d) to the field's units; float32."""
    x, scale, offset = _operands(x, field)
    return (x - offset) / scale


def _operands(x, field: Field):
    scale, offset = field["scale"], field["offset"]
    x = x.astype(np.float32) if hasattr(x, "astype") else np.asarray(x, np.float32)
    if x.shape[-1:] != scale.shape:
        raise ValueError(
            f"this normaliser has {scale.shape[0]} columns, but the array's shape is {x.shape}"
        )
    return x, scale, offset
