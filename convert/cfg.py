"""Reads and checks the values of a checkpoint's cfg; errors name the key.

UVA uses most of these values only in rollouts or sampling, hours into training. Checking them here
lets the conversion fail instead of the converted policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from uva_jax.models import policy_config as pc
from uva_jax.models.diffusion import space_timesteps
from uva_jax.models.frames import frame_indices
from uva_jax.models.token_sampler import masked_counts
from uva_jax.runtime.errors import UserError

AR = "model.policy.autoregressive_model_params"
_MEND = "correct it in the checkpoint (load it with torch, change its 'cfg', save it again)"
_MOST_STEPS = 10_000  # of a diffusion process


class Cfg:
    """Plain nested values by dotted key; `source` is the file that errors name."""

    def __init__(self, values: Mapping, source: str):
        self.values, self.source = values, source

    def get(self, key: str, default: object = None) -> object:
        """Returns the value of a key, or `default` if it is missing or null.

        Raises:
          UserError: the value, or a container of it, is an unresolved interpolation.
        """
        value: object = self.values
        for part in key.split("."):
            if isinstance(value, str):
                self._refuse_unresolved(key, value)
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str):
                self._refuse_unresolved(key, part)
        return default if value is None else value

    def _refuse_unresolved(self, key: str, value: str) -> None:
        if "${" in value or value == "???":
            raise UserError(
                f"{self.source}: its cfg holds an unresolved {value} at {key}: resolve it "
                "(OmegaConf.resolve(cfg) with its resolvers registered) and save it again"
            )

    def refuse(self, key: str, value: object, wanted: str) -> None:
        """Raises UserError, saying what a value must be."""
        raise UserError(
            f"{self.source}: its cfg says {key} is {value!r}, but it must be {wanted}; {_MEND}"
        )

    def integer(self, key: str, default: int | None) -> int | None:
        """Returns a whole number, which may be written as text or as 8.0."""
        value = self.get(key, default)
        if value is None:
            return None
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or number != int(number):
            self.refuse(key, value, "a whole number")
        return int(number)

    def number(self, key: str, default: float, low: float, high: float = math.inf) -> float:
        """Returns a finite number from `low` to `high`."""
        value = self.get(key, default)
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or not low <= number <= high:
            up = "" if high == math.inf else f" and at most {high:g}"
            self.refuse(key, value, f"a number of at least {low:g}{up}")
        return number

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns True or False; null gives the default."""
        value = self.get(key, default)
        if not isinstance(value, bool) and value not in (0, 1):
            self.refuse(key, value, "true or false")
        return bool(value)

    def choice(self, key: str, default: str | None, options: tuple[str, ...]) -> str | None:
        """Returns one of the options; null gives the default."""
        value = self.get(key, default)
        if value is not None and value not in options:
            self.refuse(key, value, f"one of {', '.join(options)}")
        return value

    def modes(self) -> tuple[str, ...]:
        """Returns the task modes in which the policy was trained."""
        key = "model.policy.selected_training_mode"
        both = "policy_model_full_dynamics_model"
        said = self.choice(key, None, (*pc.TASK_MODES, both))
        if said == both:
            return ("policy_model", "full_dynamic_model")
        if said:
            return (str(said),)
        modes = self.get("task.task_modes") or pc.TASK_MODES
        if not isinstance(modes, list | tuple) or not set(map(str, modes)) <= set(pc.TASK_MODES):
            self.refuse("task.task_modes", modes, f"some of {', '.join(pc.TASK_MODES)}")
        return tuple(modes)


# Rules for every policy: (field, its key in the cfg, what it must be, whether it is so). Fields of
# missing parts are skipped.


def _steps(head: str) -> Callable[[pc.PolicyConfig], bool]:
    def fits(config: pc.PolicyConfig) -> bool:
        found = getattr(config, head)
        try:
            return len(space_timesteps(found.train_steps, found.sampling_steps)) > 0
        except ValueError:
            return False

    return fits


def _does_not_raise(function: Callable[[pc.PolicyConfig], object]) -> Callable:
    def fits(config: pc.PolicyConfig) -> bool:
        try:
            function(config)
        except (ValueError, ArithmeticError):
            return False
        return True

    return fits


def _share(config: pc.PolicyConfig, name: str, below: bool = False) -> bool:
    value = getattr(config.mar, name)
    return 0 <= value < 1 if below else 0 <= value <= 1


def _n_actions(config: pc.PolicyConfig) -> int:
    return (config.action_head or config.mar).n_actions


_Rule = tuple[str, str, str, Callable[[pc.PolicyConfig], bool]]
_RULES: tuple[_Rule, ...] = (
    (
        "n_action_steps",
        "model.policy.n_action_steps",
        "1 to {n_actions}, the actions that the policy predicts",
        lambda c: 1 <= c.n_action_steps <= _n_actions(c),
    ),
    (
        "n_obs_steps",
        "task.env_runner.n_obs_steps",
        "4 times {config.mar.n_frames}, the frames that the policy observes",
        _does_not_raise(lambda c: frame_indices(c.n_obs_steps, c.mar.n_frames)),
    ),
    (
        "num_iter",
        f"{AR}.num_iter",
        "1 to {config.mar.tokens_per_frame}, the tokens of a frame",
        _does_not_raise(lambda c: masked_counts(c.mar.tokens_per_frame, c.num_iter)),
    ),
    *(
        (
            f"{head}.train_steps",
            f"{AR}.act_diff_training_steps",
            f"1 to {_MOST_STEPS}",
            lambda c, head=head: 1 <= getattr(c, head).train_steps <= _MOST_STEPS,
        )
        for head in ("action_head", "proprio_head")
    ),
    *(
        (
            f"{head}.sampling_steps",
            f"{AR}.{key}",
            "1 to {config." + head + ".train_steps}, the diffusion steps of training",
            _steps(head),
        )
        for head, key in (
            ("action_head", "act_diff_testing_steps"),
            ("proprio_head", "act_diff_testing_steps"),
            ("video_head", "num_sampling_steps"),
            ("wrist_head", "num_sampling_steps"),
        )
    ),
    (
        "temperature",
        f"{AR}.temperature",
        "a number of at least 0",
        lambda c: 0 <= c.temperature < math.inf,
    ),
    ("cfg", f"{AR}.cfg", "a number of at least 0", lambda c: 0 <= c.cfg < math.inf),
    (
        "cfg_schedule",
        f"{AR}.cfg_schedule",
        "linear or constant",
        lambda c: c.cfg_schedule in ("linear", "constant"),
    ),
    (
        "normalizer_type",
        "task.dataset.normalizer_type",
        "all or none",
        lambda c: c.normalizer_type in ("all", "none"),
    ),
    *(
        (
            f"mar.{name}",
            key,
            "0 to 1" + (", but not 1" if below else ""),
            lambda c, name=name, below=below: _share(c, name, below),
        )
        for name, key, below in (
            ("attn_dropout", f"{AR}.attn_dropout", True),
            ("proj_dropout", f"{AR}.proj_dropout", True),
            ("mask_ratio_min", f"{AR}.mask_ratio_min", True),
            ("label_drop_prob", f"{AR}.label_drop_prob", False),
            ("action_mask_ratio", "model.policy.action_mask_ratio", False),
        )
    ),
)


def check(config: pc.PolicyConfig, source: str, *, inferred: bool) -> None:
    """Checks that a policy can act and be trained.

    Args:
      config: the policy.
      source: the file that errors name.
      inferred: the policy comes from a cfg, so that errors name its keys; otherwise they name
        fields of the description.

    Raises:
      UserError: a value is out of range.
    """
    for field, key, wanted, fits in _RULES:
        *parents, name = field.split(".")
        part = config
        for parent in parents:
            part = getattr(part, parent)
        if part is not None and not fits(config):
            said = getattr(part, name)
            wanted = wanted.format(config=config, n_actions=_n_actions(config))
            if inferred:
                Cfg({}, source).refuse(key, said, wanted)
            raise UserError(
                f"{source}: its description says {field} is {said!r}, but it must be {wanted}; "
                "correct it there"
            )


def check_horizon(cfg: Cfg, n_frames: int) -> None:
    """Checks that a training window has history and future for the policy's frames.

    With `use_history_action` upstream reads one step more and drops it.

    Raises:
      UserError: `task.dataset.horizon` does not fit.
    """
    key = "task.dataset.horizon"
    horizon = cfg.integer(key, None)
    if horizon is None:
        return
    for steps in (horizon, horizon - 1):
        try:
            frame_indices(steps, n_frames, train=True)
            return
        except (UserError, ArithmeticError, ValueError):
            continue
    cfg.refuse(key, horizon, f"8 times {n_frames}, or one more if past actions are read")


def contradictions(cfg: Cfg, config: pc.PolicyConfig) -> list[str]:
    """Returns a sentence for each value of the cfg that contradicts the tensors, which are used."""
    mar, policy, params = config.mar, "model.policy", AR
    heads = {"": config.video_head, "_act": config.action_head}
    found = {
        f"{policy}.use_history_action": mar.history_action,
        f"{policy}.use_proprioception": bool(mar.proprio_dim),
        f"{policy}.predict_wrist_img": mar.wrist,
        f"{policy}.predict_proprioception": config.proprio_head is not None,
        f"{policy}.action_model_params.predict_action": config.action_head is not None,
        f"{params}.predict_video": config.video_head is not None,
    }
    said = []
    for key, there in found.items():
        if cfg.get(key) is not None and cfg.flag(key) != there:
            said.append((key, cfg.get(key), "hold one" if there else "hold none"))
    language = cfg.get("task.dataset.language_emb_model")
    if cfg.get("task.dataset") is not None and (language is not None) != bool(mar.text_dim):
        held = "take language" if mar.text_dim else "take no language"
        said.append(("task.dataset.language_emb_model", language, held))
    sizes = {
        f"{params}.vae_embed_dim": config.vae.z_channels,
        f"{params}.vae_stride": config.vae.stride,
        **{
            f"{params}.diffloss{end}_{letter}": getattr(head, name)
            for end, head in heads.items()
            if head is not None
            for letter, name in (("d", "depth"), ("w", "width"))
        },
    }
    for key, size in sizes.items():
        if (stated := cfg.integer(key, None)) not in (None, size):
            said.append((key, stated, f"say {size}"))
    shape = cfg.get("task.shape_meta.action.shape")
    if isinstance(shape, list) and shape != [mar.action_dim]:
        said.append(("task.shape_meta.action.shape", shape, f"say [{mar.action_dim}]"))
    return [f"its cfg says {key} is {value!r}, but its tensors {rest}" for key, value, rest in said]
