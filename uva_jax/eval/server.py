"""A policy server that speaks openpi's websocket protocol, as the `predict` of a rollout pool.

The server sends its metadata when a client connects. It answers each observation, a mapping of
arrays packed with msgpack, with {"actions": (horizon, action_dim)}, or with text if it failed.
Every slot has a connection of its own, which is opened anew for each episode, so that servers which
keep a history keep it by episode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from uva_jax.envs.episode import PICTURES, RolloutSpec
from uva_jax.envs.simulator import SimulatorInfo
from uva_jax.eval.rollout import EMPTY
from uva_jax.runtime.errors import UserError

PREFIXES = ("ws://", "wss://")
_PATIENCE = 600.0  # seconds in which a server has to answer; its first call may compile


def pack(message: Mapping[str, Any]) -> bytes:
    """Packs a message of arrays, numbers and text as openpi does.

    Raises:
      TypeError: it holds something else.
    """
    return _msgpack().packb(message, default=_encoded)


def unpack(data: bytes) -> Any:
    """Reads what `pack` wrote.

    Raises:
      TypeError, ValueError: the data are something else.
    """
    return _msgpack().unpackb(data, object_hook=_decoded)


def _msgpack() -> Any:
    import msgpack

    return msgpack


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufSU":
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    raise TypeError(f"a {type(value).__name__} cannot be sent to a policy server")


def _decoded(value: dict) -> Any:
    if b"__ndarray__" in value:
        flat = np.frombuffer(value[b"data"], np.dtype(value[b"dtype"]))
        return flat.reshape(value[b"shape"])
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value


class ServerPolicy:
    """A policy behind a server; a context manager, which closes the connections.

    Attributes:
      spec: what it observes and executes in each call.
      metadata: what the server said of itself.
    """

    def __init__(
        self,
        address: str,
        simulator: SimulatorInfo,
        *,
        observation: Mapping[str, str] | None = None,
        action_steps: int = 8,
        max_steps: int = 300,
    ):
        """Connects once.

        Args:
          address: ws://host:port.
          simulator: in which it acts.
          observation: the simulator's name of each array that is sent, by the name under which the
            server reads it; by default all arrays under their own names. The task's sentence is
            sent as "prompt", if there is one.
          action_steps: actions of a chunk that are executed before the next call.
          max_steps: limit of an episode's length.

        Raises:
          UserError: the packages are missing, no server answers, or the simulator lacks an array.
        """
        self._address, self._simulator = address, simulator
        self._sent = dict(observation or {name: name for name in simulator.observes})
        simulator.check(tuple(self._sent.values()), simulator.action_dim, address)
        self.spec = RolloutSpec(
            names=tuple(dict.fromkeys(self._sent.values())),
            n_obs_steps=1,
            frames=(0,),
            chunk=action_steps,
            max_steps=max_steps,
        )
        self._open: dict[int, Any] = {}  # by slot
        try:
            import msgpack  # noqa: F401
            import websockets  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"policy servers need further packages ({error}): pip install 'uva_jax[serve]'"
            ) from error
        connection, self.metadata = self._connect()
        connection.close()

    def __enter__(self) -> ServerPolicy:
        return self

    def __exit__(self, *_) -> None:
        for connection in self._open.values():
            with contextlib.suppress(Exception):
                connection.close()
        self._open = {}

    def __call__(
        self,
        obs: Mapping[str, np.ndarray],
        seed_index: np.ndarray,
        call_index: np.ndarray,
        slots: np.ndarray,
    ) -> np.ndarray:
        """Returns actions; see `RolloutPool.run`. The noise is the server's own.

        Raises:
          UserError: the server has ended, failed, or returned no chunk of actions.
        """
        rows = np.flatnonzero(seed_index != EMPTY).tolist()
        for row in rows:
            slot = int(slots[row])
            if call_index[row] == 0 or slot not in self._open:
                with contextlib.suppress(Exception):
                    self._open.pop(slot).close()
                self._open[slot] = self._connect()[0]
            self._exchange(self._open[slot].send, pack(self._message(obs, row)))
        width = self._simulator.action_dim
        actions = np.zeros((len(seed_index), self.spec.chunk, width))
        for row in rows:
            answer = self._exchange(self._open[int(slots[row])].recv, _PATIENCE)
            actions[row] = self._chunk(answer, width)
        return actions

    def _message(self, obs: Mapping[str, np.ndarray], row: int) -> dict[str, Any]:
        """Returns the current observation of one row."""
        message: dict[str, Any] = {}
        for name, key in self._sent.items():
            value = obs[key][row, 0 if key in PICTURES else -1]
            message[name] = np.ascontiguousarray(value)
        if self._simulator.tasks:
            message["prompt"] = self._simulator.tasks[obs["task"][row]]
        return message

    def _chunk(self, answer: bytes | str, width: int) -> np.ndarray:
        """Returns the actions (action_steps, width) of an answer."""
        if isinstance(answer, str):
            last = answer.strip().splitlines()[-1] if answer.strip() else "no reason given"
            raise UserError(f"the policy server {self._address} failed: {last}")
        try:
            actions = np.asarray(unpack(answer)["actions"], np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the policy server {self._address} returned no 'actions' ({error}): it does not "
                "speak openpi's protocol"
            ) from error
        steps = self.spec.chunk
        if actions.ndim != 2 or len(actions) < steps or actions.shape[1] != width:
            raise UserError(
                f"the policy server {self._address} returned actions of shape {actions.shape}, but "
                f"{steps} actions of {width} numbers are executed: change --action-steps, or the "
                "server"
            )
        if not np.isfinite(actions[:steps]).all():
            raise UserError(f"the policy server {self._address} returned actions of nan or inf")
        return actions[:steps]

    def _connect(self) -> tuple[Any, dict]:
        from websockets.sync.client import connect

        connection = self._exchange(
            lambda: connect(
                self._address,
                compression=None,
                max_size=None,
                ping_interval=None,  # a server that computes does not answer pings
                close_timeout=1,
            )
        )
        metadata = self._exchange(connection.recv, _PATIENCE)
        try:
            return connection, dict(unpack(metadata))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self._address} sent no metadata when the connection opened ({error}): it does "
                "not speak openpi's protocol"
            ) from error

    def _exchange(self, call, *args) -> Any:
        """Calls a function of the connection.

        Raises:
          UserError: the server cannot be reached or has ended the connection.
        """
        from websockets.exceptions import WebSocketException

        try:
            return call(*args)
        except (OSError, EOFError, WebSocketException) as error:
            raise UserError(
                f"the policy server {self._address} cannot be reached ({error or 'no answer'}): "
                "start it and run the same command again; the seeds that are done are kept"
            ) from error
