"""Many environments in Blender, stepped at once, or each at its own pace."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate

from blendtorch_shm.arguments import integer
from blendtorch_shm.errors import ConfigurationError, StreamTimeout
from blendtorch_shm.launch.address import checked
from blendtorch_shm.memory.rows import Batch, Batches
from blendtorch_shm.message.leaves import said as said_leaves
from blendtorch_shm.wording import counted

from ..constants import DEFAULT_TIMEOUTMS
from .description import Description, info_of, is_over, plain_action, reward_of
from .launch import launched, name_of
from .pace import EnvStats, Pace
from .pictures import no_picture
from .requests import Answer, Refused, Requests

Array = npt.NDArray[Any]


class _Kept(NamedTuple):
    """The last observation of an environment, as it came."""

    values: Sequence[Array]
    """Its leaves."""
    holding: object
    """What keeps their memory from being used again."""


class _Rows:
    """Room for an observation of each environment: its row. What is asked of different ones at different times may share it.

    Attributes:
        arrays: of each leaf of an observation, (num_envs, ...).
        batch: in shared memory, that these lie in. None: they are ordinary memory.
        used: environments whose rows something was asked for.
    """

    def __init__(self, arrays: Sequence[Array], batch: Batch | None) -> None:
        self.arrays = arrays
        self.batch = batch
        self.used: set[int] = set()

    def put(self, env: int, values: Sequence[Array]) -> None:
        """Copy a row in, for an instance that does not write it."""
        if self.batch is not None:
            self.batch.put(env, values)
        else:
            self.fill(env, values)

    def fill(self, env: int, values: Sequence[Array]) -> None:
        """Copy a row in that nobody was asked for, now that the others are written. It is the trainer's own: an instance may have
        kept what it rendered there earlier.
        """
        for array, value in zip(self.arrays, values, strict=True):
            array[env] = value

    def as_it_came(self, env: int) -> _Kept:
        """A row of a batch, without what the trainer changes in it."""
        assert self.batch is not None
        return _Kept([array[env] for array in self.batch.shared], self.arrays)

    def written(self, env: int) -> None:
        """Nobody writes to this row any more."""
        if self.batch is not None:
            self.batch.writers.discard(env)


class _Outcome(NamedTuple):
    """What came of a step or a reset of one environment."""

    env: int
    rows: _Rows
    reward: float
    is_terminated: bool
    is_truncated: bool
    info: dict[str, Any]


class _Asked(NamedTuple):
    """What was asked of an environment, and is not answered yet."""

    rows: _Rows
    is_step: bool
    is_last: bool = False
    """The trainer truncates the episode after this step."""
    seed: int | None = None
    options: dict[str, Any] | None = None


class BlenderVectorEnv(VectorEnv[Any, Any, Any]):
    """Environments in as many Blender instances, all of one script, as one batch.

    The instances render into the rows of one batch, in shared memory, so nobody copies it; an instance elsewhere sends its row,
    which is copied once. A batch stays as it is for as long as somebody has it, or a view of it: `final_obs`, a stack of frames.
    What is kept beyond `num_batches` of them, as in a replay buffer, are copies, which :meth:`stats` counts.

    An instance that ends is started again. Its episode is truncated: its observation is the last one that came, its reward 0, and
    ``infos["restarted"]`` says so. With ``launch_args={"restart": "never"}``, that is an error.

    Beside :meth:`step`, :meth:`send` and :meth:`recv` let each environment go at its own pace.

    Args:
        scene, script: as for :class:`~torch_side.BlenderLauncher`.
        num_envs: how many. As many instances are launched, and no other one to ask for spaces.
        addresses: of instances that run already, instead of these three.
        autoreset_mode: what becomes of an environment whose episode is over: see gymnasium's ``AutoresetMode``.
        render_mode: ``"rgb_array"``: :meth:`render` returns the last picture of each.
        max_episode_steps: an episode is truncated after so many steps. None: never by us.
        observation_space, action_space: of one environment, where the script declares none.
        output: ``"numpy"``, or ``"torch"``: tensors over the same memory.
        num_batches: how many batches may be kept without copies.
        timeoutms: patience for each answer, in milliseconds.
        background: as for the launcher.
        launch_args: what else the launcher is told, such as ``{"blender": "python", "seed": 7}``. Without ``"restart"`` in it, an
            instance is started again when it fails.
        **kwargs: arguments of the script: ``render_every=10`` becomes ``--render-every 10``.

    Raises:
        ConfigurationError: an argument that cannot work; no space is declared; the instances declare different ones.
        InstanceDied: a script failed before its environment ran.
        StreamTimeout: an environment did not run in time.

    Example::

        envs = btt.env.BlenderVectorEnv("cartpole.blend", "cartpole.blend.py", num_envs=4)
        observations, infos = envs.reset(seed=7)
        observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
        envs.close()
    """

    def __init__(
        self,
        scene: str | os.PathLike[str] | None = None,
        script: str | os.PathLike[str] | None = None,
        num_envs: int | None = None,
        *,
        addresses: str | Sequence[str] | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        output: str = "numpy",
        num_batches: int = 8,
        timeoutms: int = DEFAULT_TIMEOUTMS,
        background: bool = True,
        launch_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._open = contextlib.ExitStack()
        if output not in ("numpy", "torch"):
            raise ConfigurationError(f"output={output!r} is not known; use 'numpy' or 'torch'.")
        if render_mode not in (None, "rgb_array"):
            raise ConfigurationError(f"render_mode={render_mode!r} is not possible here; use 'rgb_array' or None.")
        self.autoreset_mode = _mode(autoreset_mode)
        self.render_mode = render_mode
        self.output = output
        self._script = script
        self._max_steps = math.inf if max_episode_steps is None else integer("max_episode_steps", max_episode_steps)
        try:
            if addresses is not None:
                if scene is not None or script is not None or launch_args or kwargs:
                    raise ConfigurationError(
                        "addresses= are of instances that run; scene, script and others launch some."
                    )
                there = checked(addresses)
                if num_envs not in (None, len(there)):
                    raise ConfigurationError(f"num_envs={num_envs}, and there are {len(there)} addresses.")
            else:
                if scene is None or script is None or num_envs is None:
                    raise ConfigurationError("Say scene=, script= and num_envs=; or addresses=.")
                there = list(
                    self._open.enter_context(
                        launched(
                            scene,
                            script,
                            integer("num_envs", num_envs),
                            background,
                            {"restart": "on-failure", **(launch_args or {})},
                            kwargs,
                        )
                    )
                )
            self.num_envs = len(there)
            self._requests = self._open.enter_context(Requests(there, integer("timeoutms", timeoutms)))
            said = [self._requests.describe(env) for env in range(self.num_envs)]
            described = [Description(each, script, observation_space, action_space) for each in said]
            self._description = described[0]
            for env, other in enumerate(described):
                if (other.observation_space, other.action_space) != (
                    described[0].observation_space,
                    described[0].action_space,
                ):
                    raise ConfigurationError(
                        f"Environment {env} has other spaces than environment 0: {other.observation_space} and "
                        f"{other.action_space}, not {described[0].observation_space} and {described[0].action_space}."
                    )
            self._kinds = [(leaf.shape, leaf.dtype) for leaf in self._description.leaves]
            self._is_here = [address.twin is not None for address in there]
            self._batches: Batches | None = None
            if any(self._is_here):
                first = next(address.twin for address in there if address.twin is not None)
                name = f"{first.back().prefix}.rows"
                # One is rendered into; and where what is returned is a copy, the last one is kept here alone.
                number = integer("num_batches", num_batches) + 2
                self._batches = self._open.enter_context(
                    contextlib.closing(Batches(name, self.num_envs, self._kinds, number))
                )
        except BaseException:
            self._open.close()
            raise
        self.single_observation_space = self._description.observation_space
        self.single_action_space = self._description.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": self._description.fps,
            "autoreset_mode": self.autoreset_mode,
        }
        self._pace = Pace(self.num_envs)
        self._said_leaves = said_leaves(self._description.leaves)
        self._begun: _Rows | None = None  # that has rows left
        self._asked: list[_Asked | None] = [None] * self.num_envs
        self._given_up: list[list[_Rows]] = [[] for _ in range(self.num_envs)]  # but somebody may write there still
        self._final: list[dict[str, Any] | None] = [None] * self.num_envs
        self._done: deque[_Outcome] = deque()  # in the order in which they came
        self._steps = [0] * self.num_envs
        self._is_over = np.ones(self.num_envs, bool)  # before the first reset, no episode has begun
        self._was_reset = False
        self._pictures: list[Array | None] = [None] * self.num_envs
        self._last: list[_Kept | None] = [None] * self.num_envs

    # -- all at once --------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in each environment.

        Args:
            seed: environment i gets `seed` + i; or one for each. None: what is random goes on.
            options: what each script's ``_env_reset`` gets. With ``"reset_mask"``, an array (N,) bool, only these are reset;
                the observations of the others are their last ones.

        Returns:
            the observations, (N, ...), and what else the scripts say.

        Raises:
            ConfigurationError: another number of seeds, or a mask that is none.
            StreamTimeout: no answer in time.
            InstanceDied: an instance ended, and is not started again.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        seeds = self._seeds(seed)
        mask, options = self._mask(options)
        for env, is_reset in enumerate(mask):
            if not is_reset and self._last[env] is None:
                raise ConfigurationError(f"reset_mask leaves environment {env} out, which was never reset.")
        self._give_up()
        rows = self._room(range(self.num_envs))
        reset = mask.nonzero()[0].tolist()
        for env in reset:
            self._ask_reset(env, rows, seeds[env], options)
        self._was_reset = True
        outcomes = self._wait_for(reset)
        for env, last in enumerate(self._last):
            if not mask[env] and last is not None:
                rows.fill(env, last.values)
        infos: dict[str, Any] = {}
        for outcome in outcomes:
            infos = self._add(infos, outcome.info, outcome.env)
        return self._observations(rows, reset), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Act in each environment, and let each scene play one frame.

        Args:
            actions: (N, ...), of `action_space`; a tensor will do.

        Returns:
            observations (N, ...), rewards (N,) float64, terminations and truncations (N,) bool, and what else the scripts say:
            by key, an array (N,), and under ``_`` and the key which environments said it.

        Raises:
            ConfigurationError: no :meth:`reset` before; another number of actions; or one that was sent is not received yet.
            StreamTimeout: no answer in time.
            InstanceDied: an instance ended, and is not started again.
        """
        self._require_idle()
        self._require_episodes(range(self.num_envs))
        each = self._actions(actions, self.num_envs)
        rows = self._room(range(self.num_envs))
        for env, action in enumerate(each):
            self._ask_step(env, rows, action)
        outcomes = self._wait_for(range(self.num_envs))
        return (self._observations(rows, range(self.num_envs)), *self._collect(outcomes))

    # -- each at its own pace -----------------------------------------------------------------------------------

    def async_reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> None:
        """Ask each environment to begin an episode. :meth:`recv` returns their first observations."""
        super().reset(seed=seed if isinstance(seed, int) else None)
        if options is not None and "reset_mask" in options:
            raise ConfigurationError("async_reset() resets all environments; reset() takes a reset_mask.")
        seeds = self._seeds(seed)
        self._give_up()
        rows = self._room(range(self.num_envs))
        for env in range(self.num_envs):
            self._ask_reset(env, rows, seeds[env], options)
        self._was_reset = True

    def send(self, actions: Any, env_id: Sequence[int] | Array | None = None) -> None:
        """Act in some environments, and do not wait for what comes of it.

        An environment whose episode is over is reset instead, whatever its action; with ``SAME_STEP``, it has been.

        Args:
            actions: one for each of `env_id`, in its order.
            env_id: numbers of environments, each once, that have answered and whose answers :meth:`recv` has returned. None: all.

        Raises:
            ConfigurationError: a number that is none, or twice there, or of an environment that has not answered yet.
        """
        envs = list(range(self.num_envs)) if env_id is None else [int(env) for env in env_id]
        if len(set(envs)) != len(envs) or not all(0 <= env < self.num_envs for env in envs):
            raise ConfigurationError(f"env_id={envs}: expected numbers from 0 to {self.num_envs - 1}, each once.")
        self._require_reset()
        waiting = {outcome.env for outcome in self._done}
        busy = [env for env in envs if self._asked[env] is not None or env in waiting]
        if busy:
            raise ConfigurationError(f"Environments {busy} have not been received yet: recv() first.")
        self._require_episodes(envs)
        each = self._actions(actions, len(envs))
        rows = self._room(envs)
        for env, action in zip(envs, each, strict=True):
            self._ask_step(env, rows, action)

    def recv(
        self, min_get: int = 1, max_get: int | None = None, timeout: float | None = None
    ) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """What came of some of the steps that were sent: of those that were done first.

        Args:
            min_get: wait for so many; of fewer that are under way, for all.
            max_get: return so many at most. None: all that are there.
            timeout: patience in seconds, from now on. None: that of `timeoutms`.

        Returns:
            as :meth:`step`, of those environments only. ``infos["env_id"]``, (n,) int64, says which they are, in rising order;
            the other arrays of ``infos`` have a place for each environment, as those of :meth:`step` do.

        Raises:
            ConfigurationError: nothing is under way.
            StreamTimeout: fewer than `min_get` came in time. What came, the next call returns.
        """
        self._require_reset()
        under_way = sum(asked is not None for asked in self._asked) + len(self._done)
        if under_way == 0:
            raise ConfigurationError("recv() without send(): nothing is under way.")
        wanted = min(integer("min_get", min_get), under_way)
        most = under_way if max_get is None else min(integer("max_get", max_get, wanted), under_way)
        began = time.monotonic()
        until = math.inf if timeout is None else began + timeout
        while len(self._done) < most:  # and whatever else is here already
            is_enough = len(self._done) >= wanted
            remaining_s = until - time.monotonic()
            if not self._take_next(0.0 if is_enough else max(0.0, min(1.0, remaining_s))):
                if is_enough:
                    break
                if remaining_s <= 0:
                    raise StreamTimeout(
                        f"{counted(len(self._done), 'environment')} of {wanted} answered within {timeout} s "
                        f"(min_get={min_get}). What came is kept for the next recv()."
                    )
        self._pace.waited(began)
        outcomes = [self._done.popleft() for _ in range(min(most, len(self._done)))]
        outcomes.sort(key=lambda outcome: outcome.env)
        observations = self._gather(outcomes)
        rewards, terminated, truncated, infos = self._collect(outcomes)
        infos["env_id"] = np.array([outcome.env for outcome in outcomes], np.int64)
        return observations, rewards, terminated, truncated, infos

    def stats(self) -> EnvStats:
        """Whether the environments or the trainer are what takes the time."""
        return self._pace.stats()

    def render(self) -> tuple[Any, ...] | None:
        """The last picture of each environment, (H, W, 3) uint8.

        Raises:
            ConfigurationError: one has drawn none.
        """
        if self.render_mode is None:
            return None
        if any(picture is None for picture in self._pictures):
            raise no_picture(name_of(self._script))
        return tuple(self._pictures)

    def close_extras(self, **kwargs: Any) -> None:
        """End the instances, if they were launched here. What was handed out stays valid."""
        self._open.close()

    # -- asking -------------------------------------------------------------------------------------------------

    def _room(self, envs: Sequence[int]) -> _Rows:
        """Rows for the observations of these: of a batch that was begun, if it has them left."""
        rows = self._begun
        if rows is None or not rows.used.isdisjoint(envs):
            batch = None if self._batches is None else self._batches.take()
            if batch is not None:
                rows = _Rows(batch.arrays, batch)
            else:
                rows = _Rows([np.empty((self.num_envs, *shape), dtype) for shape, dtype in self._kinds], None)
        rows.used.update(envs)
        self._begun = rows if len(rows.used) < self.num_envs else None
        return rows

    def _ask_reset(self, env: int, rows: _Rows, seed: int | None, options: dict[str, Any] | None) -> None:
        asked = _Asked(rows, is_step=False, seed=seed, options=options)
        self._ask(env, asked, "reset", anew=True, seed=seed, options=options)
        self._steps[env] = 0
        self._is_over[env] = False

    def _ask_step(self, env: int, rows: _Rows, action: Any) -> None:
        if self._is_over[env]:
            self._ask_reset(env, rows, None, None)
            return
        self._steps[env] += 1
        is_last = self._steps[env] >= self._max_steps
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        self._ask(
            env,
            _Asked(rows, is_step=True, is_last=is_last),
            "step",
            action=action,
            **({"autoreset": True, "is_last": is_last} if same_step else {}),
        )

    def _ask(self, env: int, asked: _Asked, cmd: str, **content: Any) -> None:
        batch = asked.rows.batch
        self._asked[env] = asked  # first: what comes to nothing here, is given up later
        if batch is not None:
            batch.writers.add(env)  # we are one, for an environment elsewhere
        if batch is not None and self._is_here[env]:
            assert self._batches is not None
            where = [self._batches.name, self._batches.inode, batch.at(env), self._said_leaves]
            content["rows"] = msgspec.msgpack.encode(where)  # one field, which travels as it is
        self._pace.asked(env)
        self._requests.ask(env, cmd, **content)

    def _require_idle(self) -> None:
        self._require_reset()
        busy = [env for env, asked in enumerate(self._asked) if asked is not None]
        busy += [outcome.env for outcome in self._done]
        if busy:
            raise ConfigurationError(f"Environments {sorted(busy)} have not been received yet: recv() first.")

    def _require_reset(self) -> None:
        if self.closed:
            raise ConfigurationError("These environments are closed.")
        if not self._was_reset:
            raise ConfigurationError("No episode has begun: call reset() first.")

    def _require_episodes(self, envs: Sequence[int]) -> None:
        over = [env for env in envs if self._is_over[env]]
        if over and self.autoreset_mode is AutoresetMode.DISABLED:
            raise ConfigurationError(
                f"The episodes of environments {over} are over, and autoreset_mode is DISABLED: "
                f"reset(options={{'reset_mask': ...}}) first."
            )

    def _give_up(self) -> None:
        """What is under way is of no interest any more. Its rows are written to until the environment answers something later."""
        if self.closed:
            raise ConfigurationError("These environments are closed.")
        for env, asked in enumerate(self._asked):
            self._requests.forget(env)
            if asked is not None:
                self._given_up[env].append(asked.rows)
                self._asked[env] = None
        self._begun = None
        self._final = [None] * self.num_envs
        self._done.clear()

    def _actions(self, actions: Any, number: int) -> list[Any]:
        if isinstance(actions, torch.Tensor):
            actions = actions.detach().cpu().numpy()
        space = self.action_space if number == self.num_envs else batch_space(self.single_action_space, number)
        each = [plain_action(action) for action in iterate(space, actions)]
        if len(each) != number:
            raise ConfigurationError(f"There are {len(each)} actions for {counted(number, 'environment')}.")
        return each

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + env for env in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ConfigurationError(f"There are {len(seed)} seeds for {counted(self.num_envs, 'environment')}.")
        return [None if each is None else int(each) for each in seed]

    def _mask(self, options: dict[str, Any] | None) -> tuple[npt.NDArray[np.bool_], dict[str, Any] | None]:
        if options is None or "reset_mask" not in options:
            return np.ones(self.num_envs, bool), options
        mask = options["reset_mask"]
        if (
            not isinstance(mask, np.ndarray)
            or mask.shape != (self.num_envs,)
            or mask.dtype != np.bool_
            or not mask.any()
        ):
            raise ConfigurationError(
                f"options['reset_mask'] has to be an array ({self.num_envs},) of bool, with a True in it; it is {mask!r}."
            )
        return mask, {key: value for key, value in options.items() if key != "reset_mask"} or None

    # -- answers ------------------------------------------------------------------------------------------------

    def _wait_for(self, envs: Sequence[int]) -> list[_Outcome]:
        """The outcomes of these, in their order; nothing else is under way."""
        began = time.monotonic()
        while len(self._done) < len(envs):
            self._take_next(1.0)
        self._pace.waited(began)
        outcomes = sorted(self._done, key=lambda outcome: outcome.env)
        self._done.clear()
        return outcomes

    def _take_next(self, patience_s: float) -> bool:
        """Take the next answer; whether there was one within so many seconds."""
        try:
            answer = self._requests.next(patience_s)
        except Refused as error:
            self._drop(error.env)
            raise
        if answer is None:
            return False
        try:
            self._take(answer)
        except ConfigurationError:  # what the script says makes no sense
            self._drop(answer.env)
            raise
        return True

    def _drop(self, env: int) -> None:
        """Nothing comes any more of what was asked of an environment: it has answered."""
        asked, self._asked[env], self._final[env] = self._asked[env], None, None
        if asked is not None:
            asked.rows.written(env)

    def _take(self, answer: Answer) -> None:
        env = answer.env
        asked = self._asked[env]
        if asked is None:
            return
        for rows in self._given_up[env]:  # what was asked earlier it has done by now, or never will
            if rows is not asked.rows:
                rows.written(env)
        self._given_up[env].clear()
        if answer.ctx is None:
            self._take_replaced(env, asked)
            return
        ctx = answer.ctx
        if answer.is_final:
            self._final[env] = ctx
            return
        if ctx.get("rgb_array") is not None:
            self._pictures[env] = ctx["rgb_array"]
        asked.rows.written(env)
        if asked.rows.batch is None or not self._is_here[env]:
            self._note_last(env, asked.rows, [leaf.of(ctx.get("obs")) for leaf in self._description.leaves])
        else:
            self._last[env] = asked.rows.as_it_came(env)
        final, self._final[env] = self._final[env], None
        info = info_of(ctx)
        if final is not None:  # this is the first frame of the next episode
            self._steps[env] = 0
            over = is_over(final)
            info |= {"final_obs": self._description.observation(final), "final_info": info_of(final)}
            if "restarted" in final:
                info["restarted"] = True
            self._finish(env, asked, reward_of(final), over[0], over[1] or (asked.is_last and not over[0]), info)
        elif asked.is_step:
            terminated, truncated = is_over(ctx)
            truncated = truncated or (asked.is_last and not terminated)
            self._is_over[env] = terminated or truncated
            self._finish(env, asked, reward_of(ctx), terminated, truncated, info)
        else:
            self._finish(env, asked, 0.0, False, False, info)

    def _note_last(self, env: int, rows: _Rows, values: Sequence[Array]) -> None:
        """An observation came in a message: copy it to its row."""
        rows.put(env, values)
        self._last[env] = _Kept(values, None) if rows.batch is None else rows.as_it_came(env)

    def _finish(
        self, env: int, asked: _Asked, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]
    ) -> None:
        self._asked[env] = None
        self._pace.arrived(env)
        self._done.append(_Outcome(env, asked.rows, reward, terminated, truncated, info))

    def _take_replaced(self, env: int, asked: _Asked) -> None:
        """The instance of an environment has died, so nobody writes to its row; another one is in its place."""
        self._pace.restarts += 1
        asked.rows.written(env)
        if not asked.is_step:
            self._ask_reset(env, asked.rows, asked.seed, asked.options)
            return
        last = self._last[env]
        assert last is not None
        values = [array.copy() for array in last.values]
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            ended = self._final[env] or {"obs": self._description.batch(values)}
            terminated, truncated = is_over(ended)
            self._final[env] = {**ended, "truncated": truncated or not terminated, "restarted": True}
            self._ask_reset(env, asked.rows, None, None)
            return
        self._note_last(env, asked.rows, values)
        self._is_over[env] = True
        self._finish(env, asked, 0.0, False, True, {"restarted": True})

    # -- what is returned ---------------------------------------------------------------------------------------

    def _observations(self, rows: _Rows, envs: Sequence[int]) -> Any:
        """All rows as they are; a copy, if too few others are free."""
        self._pace.returned(envs)
        arrays = rows.arrays
        if self._must_be_copied(rows):
            arrays = [array.copy() for array in arrays]
        self._pace.copied += self._batches is not None and (rows.batch is None or arrays is not rows.arrays)
        return self._description.batch([self._out(array) for array in arrays])

    def _gather(self, outcomes: Sequence[_Outcome]) -> Any:
        """The observations of some environments, by number: their rows as they are, if these lie side by side and no other ones
        there are written to; else a copy of them.
        """
        envs = [outcome.env for outcome in outcomes]
        rows = outcomes[0].rows
        batch = rows.batch
        if len(envs) == self.num_envs and all(outcome.rows is rows for outcome in outcomes):
            return self._observations(rows, envs)
        self._pace.returned(envs)
        if (
            batch is not None
            and all(outcome.rows is rows for outcome in outcomes)
            and envs == list(range(envs[0], envs[0] + len(envs)))
            and not batch.writers
            and not self._must_be_copied(rows)
        ):
            if rows is self._begun:
                self._begun = None
            arrays = [array[envs[0] : envs[0] + len(envs)] for array in rows.arrays]
        else:
            self._pace.copied += self._batches is not None
            arrays = [
                np.stack([outcome.rows.arrays[number][outcome.env] for outcome in outcomes])
                for number in range(len(self._kinds))
            ]
            for row, env in enumerate(envs):  # as few batches as possible are kept
                self._last[env] = _Kept([array[row] for array in arrays], None)
        return self._description.batch([self._out(array) for array in arrays])

    def _must_be_copied(self, rows: _Rows) -> bool:
        """Whether, if this batch was handed out, none would be left for the next step and the one after."""
        return rows.batch is not None and self._batches is not None and self._batches.free() < 2

    def _collect(self, outcomes: Sequence[_Outcome]) -> tuple[Any, Any, Any, dict[str, Any]]:
        infos: dict[str, Any] = {}
        for outcome in outcomes:
            infos = self._add(infos, outcome.info, outcome.env)
        return (
            self._out(np.array([outcome.reward for outcome in outcomes], np.float64)),
            self._out(np.array([outcome.is_terminated for outcome in outcomes], np.bool_)),
            self._out(np.array([outcome.is_truncated for outcome in outcomes], np.bool_)),
            infos,
        )

    def _add(self, infos: dict[str, Any], info: dict[str, Any], env: int) -> dict[str, Any]:
        """What one environment says, in gymnasium's way. Where no array of one kind will do, it is one of objects."""
        for key, value in info.items():
            if value is None:
                continue
            known = infos.get(key)
            is_dict = isinstance(value, dict) and key != "final_obs"
            if is_dict and isinstance(known, dict | None):
                infos[key] = self._add(known or {}, value, env)
                infos.setdefault(f"_{key}", np.zeros(self.num_envs, np.bool_))[env] = True
                continue
            try:
                if is_dict or isinstance(known, dict):
                    raise TypeError("some say a dict")
                infos = self._add_info(infos, {key: value}, env)
            except (TypeError, ValueError):
                infos[key] = _objects(infos[key], infos[f"_{key}"])
                infos[key][env], infos[f"_{key}"][env] = value, True
        return infos

    def _out(self, array: Array) -> Any:
        return torch.from_numpy(array) if self.output == "torch" else array


def _objects(known: Any, mask: Array) -> Array:
    """What environments said so far, as an array of objects."""
    objects = np.full(len(mask), None, object)
    for env in mask.nonzero()[0]:
        if isinstance(known, dict):
            objects[env] = {key: each[env] for key, each in known.items() if f"_{key}" in known}
        else:
            objects[env] = known[env]
    return objects


def _mode(given: AutoresetMode | str) -> AutoresetMode:
    try:
        return AutoresetMode(given)
    except ValueError:
        pass
    try:
        return AutoresetMode[str(given)]
    except KeyError:
        names = ", ".join(mode.name for mode in AutoresetMode)
        raise ConfigurationError(f"autoreset_mode={given!r} is not known; use one of {names}.") from None
