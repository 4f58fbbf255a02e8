#!/usr/bin/env bash
# Seeded grids. A finished run is skipped, an interrupted one continues.
#   bash benchmark.sh noise      rollout weights x sigma_init x sigma_prior x beta on cartpole10, 5 seeds
# JOBS: parallel runs, one thread each (default: number of cores). SEEDS: e.g. "1 2 3 4 5".
set -euo pipefail
export OMP_NUM_THREADS=1
jobs=${JOBS:-$(nproc)}

noise() {
    for seed in ${SEEDS:-1 2 3 4 5}; do
        for rollout in mean sample; do for init in 0.01 0.03 0.1; do for prior in 0.1 1; do for beta in 0.1 1; do
            echo "varshare_ppo.py --env-id cartpole10 --total-timesteps 500000 --seed $seed \
--rollout-weights $rollout --sigma-init $init --sigma-prior $prior --beta $beta \
--run-name noise__${rollout}__init${init}__prior${prior}__beta${beta}__$seed --resume"
        done; done; done; done
    done
}

noise | xargs -P "$jobs" -I{} sh -c 'python {} >/dev/null 2>&1 || echo "failed: {}"'
