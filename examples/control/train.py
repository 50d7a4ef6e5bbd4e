"""Trains a small policy to keep the pole up, with PPO of stable-baselines3, and shows what it learnt.

pip install '.[torch,env,blender,examples,control]'
python train.py --help
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cartpole import EVERY, PICTURES, save_pictures
from cartpole_env import CartPoleEnv, CartPoleVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

import blendtorch.btt as btt

HERE = Path(__file__).parent


class ForStableBaselines(VecEnv):
    """Environments of gymnasium that are stepped at once, as stable-baselines3 wants them: it has an interface of its own.

    Args:
        envs: with the autoreset mode ``SAME_STEP``.
    """

    def __init__(self, envs: btt.env.BlenderVectorEnv) -> None:
        self.envs = envs
        self.actions: Any = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        # In its words a seed is set first, and counts for the next reset.
        seeds = self._seeds if any(seed is not None for seed in self._seeds) else None
        observations, self.reset_infos = self.envs.reset(seed=seeds)[0], [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        return observations

    def step_async(self, actions: Any) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
        observations, rewards, terminations, truncations, infos = self.envs.step(self.actions)
        each: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(terminations | truncations):
            each[i] = {
                "terminal_observation": infos["final_obs"][i],
                "TimeLimit.truncated": bool(truncations[i] and not terminations[i]),
            }
        return observations, rewards, terminations | truncations, each

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.envs, attr_name, None) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"{attr_name} lies in another process")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise AttributeError(f"{method_name} lies in another process")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


class Episodes(VecMonitor):
    """Notes each episode that ends: how many steps had been made by then, in all, and how many were its own."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.steps = 0
        self.ended: list[tuple[int, int]] = []

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = super().step_wait()
        self.steps += self.num_envs
        self.ended += [(self.steps, int(info["episode"]["l"])) for info in infos if "episode" in info]
        return observations, rewards, dones, infos


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40_000, help="of all instances together")
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--episode-steps", type=int, default=500, help="after so many an episode is truncated")
    parser.add_argument("--test-episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blender", help="executable, or Python with bpy (default: found by itself)")
    parser.add_argument("--out", type=Path, default=HERE / "tmp")
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> tuple[PPO, list[tuple[int, int]]]:
    """The policy, and the episodes that it learnt from."""
    envs = CartPoleVectorEnv(
        args.instances,
        autoreset_mode="SameStep",
        steps=args.episode_steps,
        launch_args={"blender": args.blender, "seed": args.seed},
    )
    episodes = Episodes(ForStableBaselines(envs))
    try:
        policy = PPO(
            "MlpPolicy",
            episodes,
            n_steps=1024 // args.instances,
            batch_size=128,
            learning_rate=1e-3,
            gamma=0.98,
            seed=args.seed,
            device="cpu",
        )
        began = time.perf_counter()
        policy.learn(args.steps)
        took = time.perf_counter() - began
        print(f"Trained with {episodes.steps} steps in {took:.0f} s, {episodes.steps / took:.0f} steps/s.")
    finally:
        episodes.close()
    return policy, episodes.ended


def test(policy: PPO, args: argparse.Namespace) -> list[int]:
    """How long the policy keeps the pole up, in episodes that it has not seen, without exploring."""
    env = CartPoleEnv(steps=args.episode_steps, launch_args={"blender": args.blender})
    lengths = []
    try:
        for episode in range(args.test_episodes):
            observation, _ = env.reset(seed=1_000_000 + args.seed + episode)
            over = False
            lengths.append(0)
            while not over:
                action, _ = policy.predict(observation, deterministic=True)
                observation, _, terminated, truncated, _ = env.step(action)
                over = terminated or truncated
                lengths[-1] += 1
    finally:
        env.close()
    print(
        f"In {len(lengths)} other episodes of {args.episode_steps} steps, the pole stays up for {np.mean(lengths):.0f} steps on"
        f" average, {min(lengths)} at least."
    )
    return lengths


def plot(ended: list[tuple[int, int]], path: Path) -> None:
    """The length of each episode, and the mean of the last 20."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, lengths = np.array(ended).T
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(steps, lengths, ".", color="0.7", markersize=3, label="an episode")
    means = [lengths[max(0, i - 19) : i + 1].mean() for i in range(len(lengths))]
    axes.plot(steps, means, label="mean of the last 20")
    axes.set_xlabel("steps of all instances")
    axes.set_ylabel("steps until the pole fell")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"Saved {path}")


def show(policy: PPO, args: argparse.Namespace) -> None:
    """Some pictures of an episode that begins with a pole that leans a lot: what happens by itself, and with the policy."""
    env = CartPoleEnv("rgb_array", launch_args={"blender": args.blender})
    rows = []
    try:
        for acts in (False, True):
            rows.append([])
            observation, _ = env.reset(seed=0, options={"angle": 0.2, "position": -1.0})
            for step in range(EVERY * PICTURES):
                if step % EVERY == 0:
                    rows[-1].append(env.render())
                action = policy.predict(observation, deterministic=True)[0] if acts else np.zeros(1, np.float32)
                observation = env.step(action)[0]
    finally:
        env.close()
    save_pictures(rows, args.out / "policy.png")


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # the network is small, and the processor has to render
    policy, ended = train(args)
    args.out.mkdir(parents=True, exist_ok=True)
    policy.save(args.out / "policy.zip")
    plot(ended, args.out / "learning_curve.png")
    test(policy, args)
    show(policy, args)


if __name__ == "__main__":
    main()
