"""The port against reference outputs of the original, kept in tests/goldens/port.

Each file covers one part: schedules, the four aggregators with their networks and losses, the
full-width VAE, the transformer in all five task modes, the network of the Fréchet video distance.
"""

from pathlib import Path

import pytest

from convert.checks.fixtures import verify_folder
from uva_jax.runtime.errors import UserError

GOLDENS = Path(__file__).parent / "goldens" / "port"


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("diffusion_schedules", 22),
        ("action_heads", 21),
        ("vae_kl16_formula", 6),
        ("mar_pusht", 44),
        ("fvd", 20),
    ],
)
def test_every_recorded_output_is_within_its_bound(name, outputs):
    checks = verify_folder(GOLDENS, only=(name,), show=lambda line: None)
    assert len(checks) == outputs
    assert not [f"{c.name}: {c.error:.2e} > {c.bound:.2e}" for c in checks if not c.ok]


def test_every_output_gets_a_line_and_the_last_line_sums_up():
    lines = []
    checks = verify_folder(GOLDENS, only=("diffusion_schedules",), show=lines.append)
    assert sum(line.endswith(" ok") for line in lines) == len(checks)
    assert lines[-1].startswith("all: 22 outputs checked, 0 failed; the worst error is")


def test_a_folder_without_reference_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.npz file in the golden format"):
        verify_folder(tmp_path)
