"""Devices, precisions and counters for timing torch beside JAX (`python -m uva_jax bench`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from convert.torch.diffusion import Schedule


def _attention(query, key, value, *args, **kwargs) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *args, **kwargs) -> int:
    return flop_counter.sdpa_backward_flop_count(grad, query, key, value)


# A CPU's operations that the counter does not know by itself; functions of shapes.
_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def device() -> str:
    """Returns "cuda" if there is a GPU, or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_threads(count: int) -> None:
    """Uses so many threads on a CPU; JAX uses one for each core."""
    torch.set_num_threads(count)


def precision(dtype: str) -> torch.autocast:
    """Returns a new context in which products are in bfloat16, or one without effect."""
    return torch.autocast(device(), torch.bfloat16, enabled=dtype == "bfloat16")


def ready(module: nn.Module, dtype: str = "float32") -> nn.Module:
    """Fills a module with random weights on the device.

    With dtype "bfloat16" the weights of products are rounded once, as for inference; training
    keeps them in float32.
    """
    torch.manual_seed(0)
    for parameter in module.parameters():  # tables start at zero; any values are good for timing
        nn.init.normal_(parameter, std=0.02)
    for part in module.modules():
        if dtype == "bfloat16" and isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d):
            part.to(torch.bfloat16)
    return module.to(device())


def wrapper(compiled: bool) -> Callable[[Callable], Callable]:
    """Returns `torch.compile`, or a function that returns what it is given."""
    return torch.compile if compiled else lambda function: function


def schedule(steps: int, respacing: str = "") -> Schedule:
    """Returns a schedule with its tables on the device."""
    found = Schedule(steps, respacing)
    found.tables = {name: values.to(device()) for name, values in found.tables.items()}
    return found


def to_end(run: Callable[[], object]) -> Callable[[], None]:
    """Returns a function that waits until what `run` started on a GPU is done."""

    def whole():
        run()
        if device() == "cuda":
            torch.cuda.synchronize()

    return whole


def flops(run: Callable[[], object]) -> float:
    """Returns the operations of products and convolutions in a call, two for each multiply-add."""
    with FlopCounterMode(display=False, custom_mapping=_CPU) as counter:
        run()
    return float(counter.get_total_flops())


def measured(run: Callable[[], object]) -> tuple[Callable[[], None], float]:
    """Returns `to_end` of a function, and its `flops`."""
    whole = to_end(run)
    return whole, flops(whole)


def memory() -> int | None:
    """Returns the most bytes of a GPU's memory that tensors have used, or None without a GPU."""
    return torch.cuda.max_memory_allocated() if device() == "cuda" else None


def product(bfloat16: bool) -> tuple[Callable[[], None], float]:
    """Returns a product of two large matrices as a function, and its operations."""
    size = 1024 if device() == "cpu" else 8192
    x = torch.ones(size, size, dtype=torch.bfloat16 if bfloat16 else torch.float32, device=device())
    return to_end(lambda: x @ x), 2.0 * size**3
