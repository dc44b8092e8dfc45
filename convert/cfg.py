"""A checkpoint's cfg, read value by value: what makes no sense is refused by the name of its key.

UVA looks at most of these values only when an episode or a sampling loop runs, hours after training
has begun; a policy that is converted with them would fail as late.
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
_MEND = "set it right in the checkpoint (load it with torch, change its 'cfg', save it again)"
_MOST_STEPS = 10_000  # of a diffusion process


class Cfg:
    """Plain nested values under dotted keys; `source` is the file that errors speak of."""

    def __init__(self, values: Mapping, source: str):
        self.values, self.source = values, source

    def get(self, key: str, default: object = None) -> object:
        """The value of a key as it is; `default` if it is not there, or null.

        Raises:
          UserError: an interpolation was left on the way to it, or in it.
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
                f"{self.source}: its cfg holds an unresolved {value} at {key}: resolve it there "
                "(OmegaConf.resolve(cfg) where its resolvers are registered) and save it again."
            )

    def refuse(self, key: str, value: object, wanted: str) -> None:
        """Raises what a value should be."""
        raise UserError(
            f"{self.source}: its cfg says {key} is {value!r}, but it has to be {wanted}; {_MEND}."
        )

    def integer(self, key: str, default: int | None) -> int | None:
        """A whole number, which may be written as a text or as 8.0."""
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
        """A finite number from `low` to `high`."""
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
        """True or False; null is the default."""
        value = self.get(key, default)
        if not isinstance(value, bool) and value not in (0, 1):
            self.refuse(key, value, "true or false")
        return bool(value)

    def choice(self, key: str, default: str | None, options: tuple[str, ...]) -> str | None:
        """One of the options; null is the default."""
        value = self.get(key, default)
        if value is not None and value not in options:
            self.refuse(key, value, f"one of {', '.join(options)}")
        return value

    def modes(self) -> tuple[str, ...]:
        """The task modes that the policy was trained in."""
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


# What has to hold of a policy, wherever its description comes from: (field, key of the cfg that it
# comes from, what it has to be, whether it is so). Fields of parts that are not there are skipped.


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
        "4 times {config.mar.n_frames}, the frames that the policy sees",
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
            "a number of the {config." + head + ".train_steps} steps of training, at least 1",
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
    """Refuses a policy that could not act or be trained on.

    Args:
      config: the policy.
      source: the file that errors speak of.
      inferred: from a cfg, whose key is named; else the field of the description is.

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
                f"{source}: its description says {field} is {said!r}, but it has to be {wanted}; "
                "set it right there."
            )


def check_horizon(cfg: Cfg, n_frames: int) -> None:
    """Refuses a window of training that holds no history and future for the policy's frames.

    With `use_history_action` upstream reads one step more, and drops it.

    Raises:
      UserError: `task.dataset.horizon` is no such length.
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
    cfg.refuse(key, horizon, f"8 times {n_frames}, or one more where past actions are read")


def contradictions(cfg: Cfg, config: pc.PolicyConfig) -> list[str]:
    """What the cfg says otherwise than the tensors, a sentence each; the tensors are believed."""
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
