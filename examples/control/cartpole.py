"""Keeps the pole up with a controller written by hand, and saves a row of pictures of how.

python cartpole.py --help
"""

import argparse
import time
from pathlib import Path
from typing import Any

import cartpole_env
import gymnasium
import numpy as np
from controller import balance

HERE = Path(__file__).parent
PICTURES = 5
EVERY = 6


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="after so many an episode is truncated")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    parser.add_argument("--real-time", action="store_true", help="at the scene's frame rate, whether we keep up or not")
    parser.add_argument("--human", action="store_true", help="show a window instead of saving pictures")
    parser.add_argument("--blender", help="executable, or Python with bpy (default: found by itself)")
    parser.add_argument("--out", type=Path, default=HERE / "tmp")
    return parser.parse_args()


def save_pictures(rows: list[list[Any]], path: Path) -> None:
    """Rows of pictures, (H, W, 3) uint8 each, as one."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack([np.hstack(row) for row in rows])).save(path)
    print(f"Saved {path}")


def main() -> None:
    args = parse_args()
    env = gymnasium.make(
        f"cartpole_env:{cartpole_env.ID}",
        render_mode="human" if args.human else "rgb_array",
        steps=args.steps,
        real_time=args.real_time,
        launch_args={"blender": args.blender},
    )
    pictures = []
    for episode in range(args.episodes):
        state, _ = env.reset(seed=args.seed + episode)
        began = time.perf_counter()
        over, steps, total = False, 0, 0.0
        while not over:
            if episode == 0 and not args.human and steps % EVERY == 0 and len(pictures) < PICTURES:
                pictures.append(env.render())
            state, reward, terminated, truncated, _ = env.step(np.array([balance(state)], np.float32))
            over, steps, total = terminated or truncated, steps + 1, total + float(reward)
        how = "fell" if terminated else "up"
        print(
            f"episode {episode}: {steps} steps, reward {total:.0f}, {how}; {steps / (time.perf_counter() - began):.0f} steps/s"
        )
    env.close()
    if pictures:
        save_pictures([pictures], args.out / "balance.png")


if __name__ == "__main__":
    main()
