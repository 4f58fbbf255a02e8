"""Whether the landers' tasks are possible: what Gymnasium's hand-written controller reaches in each.

    python -m studies.lander_controller

It prints the tables that docs/environments.md quotes, in some minutes. Of a pad the controller is told by
moving the origin of its observation there.
"""

import numpy as np
from gymnasium.envs.box2d.lunar_lander import heuristic

from envs.lunarlander import LunarLander20, LunarLander20Goals


def print_controller(suite: type[LunarLander20], episodes: int = 100) -> None:
    """Print the table of one suite."""
    print("| task | return, discrete | landed | return, continuous | landed |\n|---|---|---|---|---|")
    for task, name in enumerate(suite.names):
        cells = []
        for continuous in (False, True):
            env, returns, landed = suite.task_class(task, continuous), np.zeros(episodes), 0
            for episode in range(episodes):
                obs, _ = env.reset(seed=episode)
                for _ in range(1000):
                    obs[0] -= env.pad
                    obs, reward, terminated, _, _ = env.step(heuristic(env, obs))
                    returns[episode] += reward
                    if terminated:
                        landed += reward == 100
                        break
            cells.append(f"{returns.mean():.0f} | {100 * landed / episodes:.0f} %")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    for suite in (LunarLander20, LunarLander20Goals):
        print_controller(suite)
