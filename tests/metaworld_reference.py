"""Episodes of Meta-World's own environments, in a process of their own, for tests/test_metaworld.py.

    python tests/metaworld_reference.py SUITE REWARD COPIES STEPS OUT.npz

Of every task COPIES environments: the first follows Meta-World's scripted policy, others move at random.
Environment i has the generator default_rng(i), which draws the goal of each of its episodes of 500 steps.
"""

import sys

import metaworld
import numpy as np
from metaworld.policies import ENV_POLICY_MAP

suite, reward, out = sys.argv[1], sys.argv[2], sys.argv[5]
copies, steps = int(sys.argv[3]), int(sys.argv[4])
benchmark = getattr(metaworld, suite)(seed=0)
obs, rewards, successes, actions = ([] for _ in range(4))
for name, task_class in benchmark.train_classes.items():
    tasks = [task for task in benchmark.train_tasks if task.env_name == name]
    for copy in range(copies):
        seed = len(obs)
        goals, random = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        env, policy = task_class(reward_function_version=reward), ENV_POLICY_MAP[name]()
        rows = [[], [], [], []]
        for step in range(steps):
            if step % env.max_path_length == 0:
                env.set_task(tasks[goals.integers(50)])
                seen, _ = env.reset()
                rows[0].append(seen)
            if copy == 0:
                action = np.clip(policy.get_action(seen.copy()), -1, 1)  # some write to it
                action = action.astype(np.float32)
            elif step % 10 == 0:  # held for a while, to come further than noise does
                action = random.uniform(-1, 1, 4).astype(np.float32)
            seen, gained, _, _, info = env.step(action)
            for row, value in zip(rows, (seen, gained, info["success"], action)):
                row.append(value)
        for rows_of_all, row in zip((obs, rewards, successes, actions), rows):
            rows_of_all.append(row)
np.savez(out, obs=obs, rewards=rewards, successes=successes, actions=actions)
