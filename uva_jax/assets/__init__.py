"""Files that ship with the package: a small PushT policy and the demonstrations it learned from."""

from pathlib import Path

_FOLDER = Path(__file__).parent
POLICY = _FOLDER / "uva_pusht_tiny.ckpt"
DEMOS = _FOLDER / "pusht_demos.npz"
