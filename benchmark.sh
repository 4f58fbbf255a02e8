#!/usr/bin/env bash
# Seeded grids of runs, then the report. A finished run is skipped, an interrupted one continues from its checkpoint:
# after any interruption give the same command again.
#
#   bash benchmark.sh power         can a suite tell methods apart? task-blind against three, on every suite -> results/power/
#   bash benchmark.sh ceilings      what each task allows: an agent of its own, 1 M steps of it -> results/ceilings/
#   bash benchmark.sh normalisation --norm-obs and --norm-value on the suites with hidden goals -> results/normalisation/
#   bash benchmark.sh cartpole      every method on cartpole10, at a short and at a long budget -> results/cartpole/
#   bash benchmark.sh identical     the same methods on ten copies of one task                  -> results/identical/
#   bash benchmark.sh lunarlander   the same methods on lunarlander20, 2 M steps (hours)        -> results/lunarlander/
#   bash benchmark.sh sac           VarShare-SAC against VarShare-PPO on cartpole10             -> results/sac/
#   bash benchmark.sh search        settings of every method on cartpole10, the same budget for each -> results/search/
#   bash benchmark.sh main          VarShare-PPO's and VarShare-SAC's numbers in the README     -> results/main/
#   bash benchmark.sh noise         beta and lambda = beta / (2 N_m sigma_prior^2), L2Soft beside -> results/noise/
#   bash benchmark.sh posterior     what a learned sigma buys, over a fixed one and over L2Soft -> results/posterior/
#   bash benchmark.sh speed         steps and updates per second on one core, nothing else running
#   bash benchmark.sh SUITE --dry-run    print the commands only
#   bash benchmark.sh report SUITE       the report alone, of whatever has finished
#
# Environment variables:
#   METHODS   of the suites of all methods (default: all that the suite compares; see the table below)
#   ENVS, SEEDS, STEPS   lists that replace those of a suite of methods, e.g. SEEDS="1 2 3" STEPS=500000
#   FLAGS     further flags of every run of these suites, e.g. FLAGS="--cuda"
#   JOBS      runs at a time, one thread each (default: number of cores; with Slurm: no limit)
#   OUT       folder of runs/ and results/ (default: the project's)
#   LAUNCHER  slurm: submit the runs as one array job and the report as a job that follows it
#   SBATCH    further options for both of them, e.g. SBATCH="--partition=long --time=2:00:00"
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
settings=$root/results/search/settings.csv # the settings that the search chose: env, steps, method, flags
cd "${OUT:-$root}"
export OMP_NUM_THREADS=1

# method, script, its flags, and its coefficient with the values that the search tries (of those without one of
# their own: the largest norm of the gradient)
methods() {
    cat <<'END'
task-blind         baselines/shared_ppo.py          max-grad-norm   0.5 2 10
varshare           varshare_ppo.py                  beta            0.001 0.01 0.1
varshare-recentred varshare_ppo.py                  reptile-alpha   0.1 0.3 1
l2soft             baselines/l2soft_ppo.py          l2-coef         0.003 0.03 0.3
l2soft-recentred   baselines/l2soft_ppo.py          reptile-alpha   0.1 0.3 1
independent        baselines/independent_ppo.py     max-grad-norm   0.5 2 10
hard-sharing       baselines/hard_sharing_ppo.py    max-grad-norm   0.5 2 10
contextual         baselines/contextual_ppo.py      embedding-size  2 4 8 16
pcgrad             baselines/pcgrad_ppo.py          max-grad-norm   0.5 2 10
cagrad             baselines/cagrad_ppo.py          cagrad-c        0.2 0.5 0.8
varshare-fixed     variants/varshare_fixed_sigma_ppo.py l2-coef     0.003 0.03 0.3
varshare-shuffled  variants/varshare_shuffled_sigma_ppo.py beta     0.001 0.01 0.1
varshare-samples   variants/varshare_samples_ppo.py beta            0.001 0.01 0.1
varshare-ppo       varshare_ppo.py                  beta            0.001 0.01 0.1
varshare-sac       varshare_sac.py                  beta            0.01 0.1 1
varshare-fixed-sac variants/varshare_fixed_sigma_sac.py beta        0.01 0.1 1
END
}

chosen_methods() { # suite
    local method default
    case $1 in
        sac) default="task-blind varshare-ppo varshare-sac" ;;
        search) default=$(methods | awk '$1 !~ /-(ppo|fixed|fixed-sac|shuffled|samples)$/ { print $1 }') ;; # the first is varshare, named beside SAC
        *) default=$(methods | awk '$1 !~ /-(ppo|sac|fixed|shuffled|samples)$/ { print $1 }') ;;
    esac
    for method in ${METHODS:-$default}; do
        methods | grep "^$method " || { echo "benchmark.sh: unknown method $method" >&2 && exit 2; }
    done
}

tuned() { # env, steps, method: the flags that the search chose, at the largest budget it tried up to these steps
    local env=${1/cartpole-identical10/cartpole10} flags=""
    [ ! -f "$settings" ] || flags=$(awk -F, -v env="$env" -v steps="$2" -v method="${3%-ppo}" '
        $1 == env && $3 == method && $2 <= steps && $2 > best { best = $2; flags = $4 } END { print flags }' "$settings")
    case $3 in *-recentred) echo "${flags:---reptile-alpha 0.1}" ;; *) echo "$flags" ;; esac # else the defaults
}

# A line per run: its name, a tab, script and flags

grid() { # suite, environments, budgets: every method with its settings
    local seed steps env method script
    for steps in ${STEPS:-$3}; do for seed in ${SEEDS:-1 2 3 4 5 6 7 8 9 10}; do for env in ${ENVS:-$2}; do
        chosen_methods "$1" | while read -r method script _; do
            printf '%s\t%s --exp-name %s --env-id %s --total-timesteps %s --seed %s --eval-interval %s %s\n' \
                "$1__${env}__${steps}__${method}__$seed" "$script" "$method" "$env" "$steps" "$seed" \
                $((steps / 10)) "$(tuned "$env" "$steps" "$method")${FLAGS:+ $FLAGS}"
        done
    done; done; done
}

learning_rates() { # method, steps
    case $1/$2 in
        *-sac/102400) echo 0.001 0.002 0.004 ;; # a run takes 30 times as long as PPO's
        *-sac/*) ;; # hours
        */102400) echo 0.006 0.012 0.024 0.048 0.096 0.192 ;;
        *) echo 0.003 0.006 0.012 0.024 0.048 ;;
    esac
}

search_runs() { # 3 to 6 learning rates x 3 or 4 values of the coefficient x 3 seeds that no result is reported of
    local steps seed rate value method script name values
    for steps in 102400 500000; do
        for seed in 101 102 103; do chosen_methods search | while read -r method script name values; do
            for rate in $(learning_rates "$method" "$steps"); do for value in $values; do
                printf '%s\t%s --exp-name %s --env-id cartpole10 --total-timesteps %s --seed %s %s\n' \
                    "search__cartpole10__${steps}__${method}__${rate}__${value}__$seed" "$script" "$method" \
                    "$steps" "$seed" "--learning-rate $rate --$name $value"
            done; done
        done; done
    done
}

run_of() { # name without seed, method, env, steps, seed, flags: the line of a run
    printf '%s\t%s --exp-name %s --env-id %s --total-timesteps %s --seed %s %s\n' "$1__$5" \
        "$(methods | awk -v method="${2%%@*}" '$1 == method { print $2 }')" "$2" "$3" "$4" "$5" "$6"
}

power_runs() { # CartPoles at three step sizes, named method@step size, of which each method's best counts
    local seed env rate method
    for seed in 1 2 3 4 5; do
        for env in cartpole10 cartpole-identical10 cartpole-goals10 cartpole-goals-physics10; do
            for rate in 0.003 0.006 0.012; do for method in task-blind independent hard-sharing varshare; do
                run_of "power__${env}__500000__$method@$rate" "$method@$rate" "$env" 500000 "$seed" \
                    "--learning-rate $rate --eval-interval 50000"
            done; done
        done
    done
    for seed in 1 2 3; do for env in lunarlander20-goals lunarlander20; do
        for method in task-blind hard-sharing varshare; do
            run_of "power__${env}__2000000__$method@0.003" "$method@0.003" "$env" 2000000 "$seed" \
                "--learning-rate 0.003 --eval-interval 200000"
        done
    done; done
}

ceilings_runs() { # a million steps of each task
    local seed env tasks
    for seed in 1 2 3; do for env in cartpole-goals10 cartpole-goals-physics10 lunarlander20-goals; do
        case $env in lunar*) tasks=20 ;; *) tasks=10 ;; esac
        run_of "ceilings__${env}" independent "$env" ${tasks}000000 "$seed" "--ent-coef 0.01"
    done; done
}

normalisation_runs() { # on seeds of which no result is reported; L2Soft and VarShare with the same penalty
    local seed env steps rate prior flags method norm coef
    for env in cartpole-goals10 cartpole-goals-physics10 lunarlander20-goals; do for seed in 101 102 103; do
        case $env in lunar*) steps=2000000 rate=0.003 prior=0.00988 ;; *) steps=500000 rate=0.006 prior=0.00699 ;; esac
        for norm in none obs value obs+value; do
            flags="--learning-rate $rate"
            case $norm in *obs*) flags="$flags --norm-obs" ;; *) flags="$flags --no-norm-obs" ;; esac
            case $norm in *value*) flags="$flags --norm-value" ;; *) flags="$flags --no-norm-value" ;; esac
            for method in task-blind hard-sharing l2soft varshare; do
                case $method in
                    l2soft) coef=" --l2-coef 0.01" ;;
                    varshare) coef=" --beta 0.001 --sigma-prior $prior" ;;
                    *) coef="" ;;
                esac
                run_of "normalisation__${env}__${steps}__$method@$norm" "$method@$norm" "$env" "$steps" "$seed" \
                    "$flags$coef"
            done
        done
    done; done
}

main_runs() { # the longest first
    local seed env
    for seed in 1 2; do printf 'main__lunarlander20__%s\tvarshare_ppo.py --env-id lunarlander20 --seed %s\n' $seed $seed; done
    for seed in 1 2; do
        printf 'main__lunarlander20-2M__%s\tvarshare_ppo.py --env-id lunarlander20 --total-timesteps 2000000 --seed %s\n' \
            $seed $seed
    done
    for env in lunarlander20 lunarlander20-continuous; do for seed in 1 2; do
        printf 'main__%s-sac__%s\tvarshare_sac.py --env-id %s --seed %s\n' $env $seed $env $seed
    done; done
    for seed in 1 2 3; do printf 'main__cartpole10-sac__%s\tvarshare_sac.py --env-id cartpole10 --seed %s\n' $seed $seed; done
    for seed in 1 2 3 4 5; do
        printf 'main__cartpole10__%s\tvarshare_ppo.py --env-id cartpole10 --reptile-alpha 0.1 --seed %s\n' $seed $seed
    done
    for seed in 1 2 3; do # CleanRL's settings
        printf 'main__CartPole-v1__%s\tvarshare_ppo.py --env-id CartPole-v1 --envs-per-task 4 %s %s\n' $seed \
            "--learning-rate 2.5e-4 --ent-coef 0.01 --clip-vloss --total-timesteps 500000" "--seed $seed"
    done
}

noise_runs() { # on seeds of which no result is reported
    local seed env lambda beta betas sigma flags="--learning-rate 0.012"
    for seed in 101 102 103; do for env in cartpole-goals10 cartpole-goals-physics10; do
        for lambda in 0.001 0.003 0.01 0.03; do
            run_of "noise__${env}__l2soft__$lambda" l2soft "$env" 500000 "$seed" "$flags --l2-coef $lambda"
            betas="0.001 0.01 0.1"
            case $lambda in 0.001 | 0.003) betas="0.0001 $betas" ;; 0.01) betas="$betas 1" ;; esac
            for beta in $betas; do
                run_of "noise__${env}__varshare__${lambda}__$beta" varshare "$env" 500000 "$seed" \
                    "$flags --beta $beta --sigma-prior $(prior "$beta" $lambda)"
            done
            case $lambda in 0.001 | 0.003) ;; *) continue ;; esac # the better ones
            for sigma in 0.001 0.003 0.01 0.03; do
                run_of "noise__${env}__varshare-fixed__${lambda}__$sigma" varshare-fixed "$env" 500000 "$seed" \
                    "$flags --l2-coef $lambda --sigma $sigma"
            done
        done
    done; done
}

prior() { # beta, lambda: sigma_prior, with 1024 samples of a task in a rollout
    awk -v beta="$1" -v lambda="$2" 'BEGIN { printf "%.3g", sqrt(beta / (2 * 1024 * lambda)) }'
}

posterior_runs() { # PPO at lambda 0.003; warm: sigma ten times as large, of those learned; SAC at its defaults
    local seed env method setting flags act lambda="--l2-coef 0.003" learned warm fixed
    learned="--beta 0.001 --sigma-prior $(prior 0.001 0.003)" fixed="$lambda --sigma 0.003" # the best of the noise suite
    warm="--beta 0.1 --sigma-prior $(prior 0.1 0.003)"
    for seed in 21 22 23 24 25 26 27 28 29 30; do
        for env in cartpole-goals10 cartpole-goals-physics10; do
            for setting in mean sample mean-recentred sample-recentred; do
                flags="--learning-rate 0.012 --eval-interval 100000" act="--rollout-weights ${setting%-*}"
                case $setting in *recentred) flags="$flags --reptile-alpha 0.1" ;; esac
                case $setting in mean*) posterior_run l2soft "$flags $lambda" ;; esac # which has nothing to draw
                posterior_run varshare-fixed "$flags $act $fixed"
                posterior_run varshare "$flags $act $learned"
                case $setting in mean) posterior_run varshare-shuffled "$flags $act $learned" ;; esac
                case $setting in mean | sample) posterior_run varshare-samples "$flags $act $learned" ;; esac
            done
            flags="--learning-rate 0.012 --eval-interval 100000"
            setting=as-wide && posterior_run varshare-fixed "$flags $lambda --sigma 0.0128" # as the median of those learned
            setting=warm
            posterior_run varshare-fixed "$flags $lambda --sigma 0.1"
            posterior_run varshare "$flags $warm"
            posterior_run varshare-shuffled "$flags $warm"
        done
        env=cartpole-goals10-sparse flags="--learning-rate 0.012 --eval-interval 100000"
        setting=mean && posterior_run task-blind "$flags"
        for setting in mean entropy; do
            [ $setting = mean ] || flags="$flags --ent-coef 0.01"
            posterior_run l2soft "$flags $lambda"
            posterior_run varshare "$flags $learned"
        done
        flags="--learning-rate 0.012 --eval-interval 100000 --rollout-weights sample"
        setting=sample && posterior_run varshare "$flags $learned" && posterior_run varshare-fixed "$flags $fixed"
        setting=sample-warm && posterior_run varshare "$flags $warm"
        posterior_run varshare-fixed "$flags $lambda --sigma 0.1"
    done
    for seed in 21 22 23; do for method in varshare-sac varshare-fixed-sac; do
        case $method in varshare-sac) flags="" ;; *) flags=" --sigma 0.01" ;; esac # as the prior of the former
        run_of "posterior__cartpole-goals10__$method@mean" "$method@mean" cartpole-goals10 200000 "$seed" \
            "--eval-interval 40000$flags"
    done; done
}

posterior_run() { # method, flags: of posterior_runs
    run_of "posterior__${env}__$1@$setting" "$1@$setting" "$env" 500000 "$seed" "$2"
}

suite_runs() {
    case $1 in
        cartpole) grid cartpole cartpole10 "102400 500000" ;;
        identical) grid identical cartpole-identical10 500000 ;;
        sac) grid sac cartpole10 102400 ;;
        lunarlander) grid lunarlander lunarlander20 2000000 ;;
        search | main | noise | posterior | power | ceilings | normalisation) "$1_runs" ;;
        *) echo "benchmark.sh: unknown suite $1: bash benchmark.sh help" >&2 && exit 2 ;;
    esac
}

report() {
    case $1 in
        search | main | noise) python "$root/results/tables.py" "$1" ;;
        power | ceilings | normalisation) PYTHONPATH=$root python -m bench.controls "$1" ;;
        posterior) PYTHONPATH=$root python -m bench.posterior ;;
        *) python "$root/report.py" runs --suite "$1" --out "results/$1" ;;
    esac
}

run_line() { # list, number of a line: that run; what it prints goes to output.txt in its folder
    local name command code=0
    IFS=$'\t' read -r name command < <(sed -n "$2p" "$1")
    mkdir -p "runs/$name"
    exec 9>"runs/$name/lock" # of another grid that has this run too
    ! command -v flock >/dev/null || flock -n 9 || { echo "$name is running already" && return 0; }
    rm -f "runs/$name/failed"
    [ -f "runs/$name/command" ] || echo "$command" >"runs/$name/command"
    if [ "$(cat "runs/$name/command")" != "$command" ]; then
        echo 2 >"runs/$name/failed"
        printf '\nfailed: %s/runs/%s has other settings than today; move it away\n' "$PWD" "$name" >&2
        return 1
    fi
    [ ! -f "runs/$name/model.pt" ] || return 0
    # shellcheck disable=SC2086 # the command is a list of words
    python "$root"/$command --run-name "$name" --resume >>"runs/$name/output.txt" 2>&1 || code=$?
    if [ $code != 0 ] && [ $code != 130 ] && [ $code != 143 ]; then # these two: it was stopped, and has saved
        echo $code >"runs/$name/failed"
        printf '\nfailed: %s (exit code %s); %s/runs/%s/output.txt ends with\n' "$name" $code "$PWD" "$name" >&2
        tail -n 5 "runs/$name/output.txt" >&2
        return 1
    fi
}

count() { # list, file: how many of its runs have that file
    cut -f1 "$1" | while read -r name; do [ ! -f "runs/$name/$2" ] || echo; done | wc -l
}

progress() { # list: finished and failed runs, and the time that the rest will take
    local finished failed total left=""
    finished=$(count "$1" model.pt) failed=$(count "$1" failed) total=$(wc -l <"$1")
    [ "$finished" -le "$before" ] ||
        left=", $(((SECONDS * (total - finished) / (finished - before) + 59) / 60)) min left"
    [ -t 1 ] || [ "$finished $failed" != "${shown:-}" ] || return 0 # not on a terminal: a line when it changes
    shown="$finished $failed"
    [ ! -t 1 ] || printf '\r'
    printf '%s' "$finished/$((total)) finished, $failed failed$left   "
    [ -t 1 ] || echo
}

stop() { # end the runs, which save first
    trap '' INT TERM HUP
    kill -TERM -- "-$pool" 2>/dev/null || true
    while kill -0 -- "-$pool" 2>/dev/null; do sleep 0.2; done
    printf '\nstopped; the same command continues\n'
    exit 130
}

launch_here() { # list
    local before pool code=0
    before=$(count "$1" model.pt)
    set -m # the runs are a process group
    xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -I{} bash "$root/benchmark.sh" run "$1" {} < <(seq "$(wc -l <"$1")") &
    pool=$!
    set +m
    trap stop INT TERM HUP
    while kill -0 "$pool" 2>/dev/null; do
        progress "$1"
        sleep 1
    done
    wait "$pool" || code=1
    trap - INT TERM HUP
    progress "$1"
    [ "$(count "$1" model.pt)" = $(($(wc -l <"$1"))) ] || code=1
    [ ! -t 1 ] || echo
    return $code
}

launch_slurm() { # suite, list: one array job, a run each of those not finished, and the report after it
    local array list common=(--parsable --cpus-per-task=1 --chdir "$PWD" --output "$PWD/runs/slurm-%j.out")
    # shellcheck disable=SC2206 # a list of words
    common+=(${SBATCH:-})
    list=$(mktemp "$PWD/runs/$1-XXXXXX.tsv") # its own, as jobs read it later
    while read -r line; do [ -f "runs/${line%%$'\t'*}/model.pt" ] || echo "$line"; done <"$2" >"$list"
    if [ ! -s "$list" ]; then # nothing is left, and sbatch refuses an empty array
        rm "$list"
        report "$1"
        return
    fi
    array=$(sbatch "${common[@]}" --job-name "$1" --array "1-$(($(wc -l <"$list")))${JOBS:+%$JOBS}" \
        --wrap "OUT='$PWD' bash '$root/benchmark.sh' run '$list' \$SLURM_ARRAY_TASK_ID")
    sbatch "${common[@]}" --job-name "$1-report" --dependency "afterany:${array%%;*}" \
        --wrap "OUT='$PWD' bash '$root/benchmark.sh' report $1" >/dev/null
    echo "array job ${array%%;*}, then the report: squeue; the same command submits what is left"
}

case ${1:-help} in
    help | -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$root/benchmark.sh" && methods ;;
    run) run_line "$2" "$3" ;;
    report) report "$2" ;;
    speed) python "$root/tests/speed.py" ;;
    *)
        lines=$(suite_runs "$1")
        if [ "${2:-}" = --dry-run ]; then
            printf '%s\n' "$lines" | while IFS=$'\t' read -r name command; do
                echo "python $root/$command --run-name $name --resume"
            done
            exit
        fi
        mkdir -p runs
        list=$PWD/runs/$1.tsv
        printf '%s\n' "$lines" >"$list"
        if [ "${LAUNCHER:-}" = slurm ]; then
            launch_slurm "$1" "$list"
        else
            failed=0
            launch_here "$list" || failed=1
            report "$1"
            exit $failed
        fi
        ;;
esac
