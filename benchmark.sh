#!/usr/bin/env bash
# Seeded grids of runs below runs/. A finished run is skipped, an interrupted one continues from its checkpoint.
#
#   bash benchmark.sh main     lunarlander20 at 8 M and 2 M steps, 2 seeds; cartpole10 with re-centring, 5 seeds;
#                              CartPole-v1 with CleanRL's settings, 3 seeds     -> results/main/
#   bash benchmark.sh noise    rollout weights x sigma_init x sigma_prior x beta on cartpole10, 500 k steps, 5 seeds
#                                                                            -> results/noise/
#   bash benchmark.sh speed    env steps per second on one core, nothing else running
#
# Environment variables: JOBS, runs at a time, one thread each (default: number of cores).
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}

main_runs() { # the longest first
    for seed in 1 2; do echo "--env-id lunarlander20 --seed $seed --run-name main__lunarlander20__$seed"; done
    for seed in 1 2; do
        echo "--env-id lunarlander20 --total-timesteps 2000000 --seed $seed --run-name main__lunarlander20-2M__$seed"
    done
    for seed in 1 2 3 4 5; do
        echo "--env-id cartpole10 --reptile-alpha 0.1 --seed $seed --run-name main__cartpole10__$seed"
    done
    for seed in 1 2 3; do # CleanRL's settings
        echo "--env-id CartPole-v1 --envs-per-task 4 --learning-rate 2.5e-4 --ent-coef 0.01 --clip-vloss" \
            "--total-timesteps 500000 --seed $seed --run-name main__CartPole-v1__$seed"
    done
}

noise_runs() {
    for seed in 1 2 3 4 5; do
        inits="0.003 0.01"
        [ "$seed" -le 3 ] && inits="$inits 0.03" # clearly worse
        for rollout in mean sample; do for init in $inits; do for prior in 0.01 0.1; do for beta in 0.001 0.1; do
            echo "--env-id cartpole10 --total-timesteps 500000 --seed $seed --rollout-weights $rollout" \
                "--sigma-init $init --sigma-prior $prior --beta $beta" \
                "--run-name noise__${rollout}__${init}__${prior}__${beta}__$seed"
        done; done; done; done
    done
}

run_all() { # lines of arguments on stdin
    mkdir -p runs
    xargs -P "$jobs" -I{} sh -c \
        'python varshare_ppo.py {} --resume >>runs/benchmark.log 2>&1 || { echo "failed: {}" >&2; exit 1; }'
}

case ${1:-} in
    main) main_runs | run_all && python results/tables.py main ;;
    noise) noise_runs | run_all && python results/tables.py noise ;;
    speed) python tests/speed.py ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" ;;
esac
