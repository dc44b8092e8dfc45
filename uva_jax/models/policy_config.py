"""The architecture of a policy as dataclasses, which `convert` infers and `policy.json` stores.

UVA derives much of its architecture from the task's name; here each such choice is a field, so that
models do not depend on tasks. All classes are frozen and compare by value, so that they can be
static arguments of jitted functions.
"""

from __future__ import annotations

import dataclasses
import types
import typing

from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections_training import TASK_MODES

AGGREGATORS = ("conv_fc", "conv_ori", "conv2", "fc2")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """KL-VAE of LDM/MAR (`kl16` at ch=128, ch_mult=(1, 1, 2, 2, 4))."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_levels: tuple[int, ...] = (4,)  # encoder levels with attention, 0 is the finest
    z_channels: int = 16
    scale_factor: float = 0.2325  # latents are multiplied by it (MAR)

    @property
    def stride(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclasses.dataclass(frozen=True)
class MARConfig:
    """The masked autoregressive transformer: encoder, decoder and its inputs."""

    encoder_embed_dim: int = 768
    encoder_depth: int = 12
    encoder_num_heads: int = 12
    decoder_embed_dim: int = 768
    decoder_depth: int = 12
    decoder_num_heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    n_frames: int = 4
    grid: tuple[int, int] = (16, 16)  # tokens per frame: rows, columns
    token_dim: int = 16  # latent channels times patch_size squared
    action_dim: int = 2
    n_actions: int = 16
    history_action: bool = False  # past actions are an input
    proprio_dim: int = 0  # width of the proprioceptive state; 0: none
    proprio_steps: int = 16  # states per window (4 with different_history_freq)
    proprio_image: bool = False  # the wrist camera's history is an input
    wrist: bool = False  # the wrist camera's future is predicted
    text_dim: int = 0  # width of the language latent; 0: no language
    text_tokens: int = 64
    attn_dropout: float = 0.1
    proj_dropout: float = 0.1
    mask_ratio_min: float = 0.7
    label_drop_prob: float = 0.1
    action_mask_ratio: float = 0.5

    @property
    def tokens_per_frame(self) -> int:
        """Video tokens of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """Video tokens of a window, without text tokens."""
        return self.n_frames * self.tokens_per_frame


@dataclasses.dataclass(frozen=True)
class MLPHeadConfig:
    """The diffusion MLP head: it denoises action steps, or video tokens if `aggregator` is None."""

    channels: int  # numbers of a row that is denoised
    z_channels: int
    width: int
    depth: int
    aggregator: str | None = None
    n_actions: int = 16
    n_frames: int = 4
    grid: tuple[int, int] = (16, 16)
    train_steps: int = 1000
    sampling_steps: str = "100"
    clip: bool = True  # clip the predicted x0 to [-1, 1] while sampling
    kind: typing.Literal["mlp"] = "mlp"


@dataclasses.dataclass(frozen=True)
class GraftedHeadConfig:
    """The head that replaces the MLP action head in a graft.

    `operators` is a tuple of `depth` triples (cross-attention, self-attention, mlp), which name the
    registered operators of each block.
    """

    channels: int
    z_channels: int
    width: int
    depth: int
    cross_attention: typing.Literal["condition", "residual"] = "condition"
    memory: typing.Literal["video", "video+aggregate"] = "video+aggregate"
    adapter: typing.Literal["conv", "linear"] = "conv"
    operators: tuple[tuple[str, str, str], ...] = ()
    num_heads: int = 8
    self_attn_heads: int = 8
    memory_width: int = 128
    cross_mlp_ratio: int = 2
    mlp_ratio: int = 4
    self_attn_window: int = 4  # steps to either side, of "windowed_self_attn"
    n_actions: int = 16
    n_frames: int = 4
    grid: tuple[int, int] = (16, 16)
    pool: tuple[int, int] = (4, 4)  # size to which the conv adapter pools each frame's grid
    train_steps: int = 1000
    sampling_steps: str = "100"
    clip: bool = True
    # Both predict eps; "x0_from_eps" is sampled in few evaluations, from the x0 that eps implies.
    prediction: typing.Literal["eps", "x0_from_eps"] = "eps"
    aggregator: str = "conv_fc"  # the teacher's, kept if memory is "video+aggregate"
    kind: typing.Literal["grafted"] = "grafted"

    @property
    def few_steps(self) -> bool:
        """Whether the head is sampled by `diffusion.few_step_loop`."""
        return self.prediction == "x0_from_eps"


HeadConfig = MLPHeadConfig | GraftedHeadConfig


def steps_of(head: HeadConfig, wanted: str = "") -> str:
    """Returns the steps of a head's sampler: `wanted` or its own; few-step heads keep their own."""
    few = isinstance(head, GraftedHeadConfig) and head.few_steps
    return head.sampling_steps if few else wanted or head.sampling_steps


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """CLIP's text transformer, which turns a task into a language latent; defaults: ViT-B/32."""

    vocab_size: int = 49408
    width: int = 512
    depth: int = 12
    num_heads: int = 8  # width // 64 in every CLIP
    max_length: int = 77  # tokens that a sentence can have
    projection: int = 512  # width of the language latent
    mlp_width: int = 2048


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """A whole policy: VAE, MAR, heads, and the shape of its inputs and outputs."""

    task: str = "pusht"  # a label; nothing depends on it
    image_size: int = 256
    patch_size: int = 1
    vae: VAEConfig = VAEConfig()
    mar: MARConfig = MARConfig()
    video_head: MLPHeadConfig | None = None
    wrist_head: MLPHeadConfig | None = None
    action_head: MLPHeadConfig | GraftedHeadConfig | None = None
    proprio_head: MLPHeadConfig | None = None
    normalizer_type: str = "all"  # "all" or "none"
    normalizer_fields: tuple[tuple[str, int], ...] = ()  # (name, width) of every field
    proprio_keys: tuple[str, ...] = ()  # observation fields concatenated to the state, in order
    n_obs_steps: int = 16
    n_action_steps: int = 8
    shift_action: bool = True
    different_history_freq: bool = False
    temperature: float = 0.95
    num_iter: int = 1
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    language_model: str | None = None
    task_modes: tuple[str, ...] = TASK_MODES
    text_tower: TextTowerConfig | None = None  # None: language latents come from elsewhere

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return self.mar.action_dim


def to_dict(config) -> dict:
    """Converts a config to plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(values: dict, cls=PolicyConfig):
    """Builds a config from plain JSON values.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type.
    """
    return _build(cls, values, cls.__name__)


def _build(kind, value, where: str):
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where} should be an object, but is {value!r}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise UserError(
                f"{where} has no field {', '.join(map(repr, unknown))}; "
                f"known fields are {', '.join(hints)}"
            )
        try:
            return kind(**{k: _build(hints[k], v, f"{where}.{k}") for k, v in value.items()})
        except TypeError as error:
            raise UserError(f"{where} is incomplete: {error}") from error
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Union or origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if isinstance(value, dict):  # the value says which class of head it is
            named = {
                typing.get_args(typing.get_type_hints(a)["kind"])[0]: a
                for a in options
                if "kind" in typing.get_type_hints(a)
            }
            if value.get("kind") in named:
                return _build(named[value["kind"]], value, where)
        return _build(options[0], value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} should be a list, but is {value!r}")
        items = (args[0],) * len(value) if args[-1] is Ellipsis else args
        if len(items) != len(value):
            raise UserError(f"{where} should have {len(items)} entries, but has {len(value)}")
        return tuple(
            _build(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(items, value, strict=True))
        )
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{where} is {value!r}; it can be one of {', '.join(map(repr, args))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where} should be {kind.__name__}, but is {value!r}")
    return value
