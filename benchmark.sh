#!/usr/bin/env bash
# The whole comparison, from the search for every method's settings to the verdicts. What has finished is skipped and
# what was interrupted continues: after any interruption give the same command again.
#
#   bash benchmark.sh                   all suites below: the searches that are not done, the runs, reports, verdicts
#   bash benchmark.sh plan              what of it is done, and how long the rest takes
#   bash benchmark.sh SUITE             one suite: search, runs, report -> results/suites/SUITE/
#   bash benchmark.sh my_tasks:pendulum4   an environment of your own -> results/suites/my_tasks-pendulum4/
#   bash benchmark.sh portfolio         VarShare's variants on both suites of CartPoles with goals
#   bash benchmark.sh search SUITE      its search alone, also if settings are committed -> results/search/
#   bash benchmark.sh commands SUITE    the commands of its runs
#   bash benchmark.sh report [SUITE]    its report alone, of whatever has finished; without SUITE all, and the verdicts
#   bash benchmark.sh STUDY [...]       a folder of studies/: power, zero-shot, leave-one-out, ...; --dry-run prints its
#                                       commands, --report-only makes its tables; claims are the verdicts
#   bash benchmark.sh speed             steps and updates per second on one core, nothing else running
#
# Environment variables:
#   METHODS, SEEDS, STEPS, TRIALS   replace a suite's, e.g. METHODS="l2soft varshare" SEEDS=3; see bench/methods.csv;
#              the runs of the search are shortened as STEPS shortens the reported ones
#   REST=1     runs whose numbers results/ has count as done, if their commands are the same: a comparison that is spread
#              over machines, or days
#   FLAGS      further flags of every run, e.g. FLAGS="--cuda"
#   JOBS       runs at a time, one thread each (default: number of cores; with Slurm: no limit)
#   OUT        folder of runs/ and results/ (default: the project's)
#   STORAGE    database of the search, e.g. postgresql+psycopg://user@host/name (default: the file runs/search.db)
#   LAUNCHER   slurm: submit the runs as one array job, and the report as a job that follows it
#   SBATCH     further options for both of them, e.g. SBATCH="--partition=long --time=2:00:00"
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${OUT:-$root}"
cd "${OUT:-$root}"
export OMP_NUM_THREADS=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

all="task-blind independent hard-sharing contextual pcgrad cagrad l2soft l2soft-recentred varshare varshare-recentred"
variants="varshare-reptile varshare-lora varshare-trust-region varshare-horseshoe varshare-learned-prior"
variants="$variants varshare-annealed"
metaworld="task-blind independent hard-sharing contextual l2soft-recentred varshare-recentred"
few="task-blind independent hard-sharing l2soft varshare"
four="task-blind independent l2soft varshare"
sac="task-blind-sac independent-sac hard-sharing-sac contextual-sac pcgrad-sac cagrad-sac l2soft-sac varshare-sac"
sac="$sac varshare-lora-sac brc-sac"
vmpo="task-blind-vmpo hard-sharing-vmpo l2soft-vmpo varshare-vmpo"
gated="task-blind independent hard-sharing contextual pcgrad cagrad l2soft varshare varshare-lora"
rivals="soft-modularization paco moore"

# shellcheck disable=SC2086 # lists of words
suites() { # what to do with each, and which alone: a suite's environment, its runs, the search for their settings
    on "$@" goals10-100k --env-id cartpole-goals10 --steps 100000 --seeds 21 --first-seed 1001 --methods $gated $rivals --searches 3 --trials 3 --per-dimension --trial-seeds 2 --trial-steps 50000 --best 2
    on "$@" goals-physics10-400k --env-id cartpole-goals-physics10 --steps 400000 --seeds 21 --first-seed 1001 --methods $gated --searches 3 --trials 2 --per-dimension --trial-seeds 1 --trial-steps 133000 --best 1 --fixed="--hidden-sizes 64 64"
    on "$@" goals-physics10-400k-2 --env-id cartpole-goals-physics10 --steps 400000 --seeds 21 --first-seed 2001 --methods $gated $rivals --searches 3 --trials 3 --per-dimension --trial-seeds 2 --trial-steps 200000 --best 3 --fixed="--hidden-sizes 64 64"
    for number in 10 20 40 80 160; do # 80 environments in all, as long as each task has one
        on "$@" "many-tasks$number" --env-id "cartpole-goals$number" --steps 500000 --seeds 5 --first-seed 1001 --methods $gated --rates 0.008 0.025 --base cartpole-goals10 --trial-steps 250000 --fixed="--envs-per-task $((number < 80 ? 80 / number : 1))"
    done
    on "$@" cartpole-goals10 --steps 1000000 --seeds 10 --methods $all $variants --trials 24 --trial-steps 500000
    on "$@" cartpole-goals-physics10 --steps 1000000 --seeds 10 --methods $all $variants --trials 12 --trial-steps 500000 --best 3
    on "$@" cartpole10 --steps 1000000 --seeds 10 --methods $all --settings cartpole-goals-physics10
    on "$@" cartpole-identical10 --steps 1000000 --seeds 10 --methods $all --settings cartpole-goals-physics10
    on "$@" sac --env-id cartpole-goals10 --steps 100000 --seeds 10 --first-seed 1001 --methods $sac --searches 2 --trials 3 --per-dimension --trial-seeds 2 --trial-steps 50000 --best 2 --fixed="--hidden-sizes 64 64"
    on "$@" sac-300k --env-id cartpole-goals10 --steps 300000 --seeds 10 --first-seed 2001 --methods $sac --settings sac --searches 2 --fixed="--hidden-sizes 64 64"
    on "$@" continuous --env-id cartpole-goals10-continuous --steps 100000 --seeds 10 --first-seed 1001 --methods $four --searches 2 --trials 3 --per-dimension --trial-seeds 2 --trial-steps 50000 --best 2 --fixed="--hidden-sizes 64 64"
    on "$@" continuous-sac --env-id cartpole-goals10-continuous --steps 100000 --seeds 10 --first-seed 1001 --methods ${four// /-sac }-sac --searches 2 --trials 3 --per-dimension --trial-seeds 2 --trial-steps 50000 --best 2 --fixed="--hidden-sizes 64 64"
    on "$@" vmpo-100k --env-id cartpole-goals10 --steps 100000 --seeds 21 --first-seed 1001 --methods $vmpo --searches 3 --trials 3 --per-dimension --trial-seeds 2 --trial-steps 50000 --best 2
    on "$@" vmpo-physics10-400k --env-id cartpole-goals-physics10 --steps 400000 --seeds 21 --first-seed 2001 --methods $vmpo --searches 3 --trials 3 --per-dimension --trial-seeds 2 --trial-steps 200000 --best 3 --fixed="--hidden-sizes 64 64"
    on "$@" lunarlander20-goals --steps 2000000 --seeds 5 --methods $few --trials 12 --trial-steps 1000000 --best 3
    on "$@" lunarlander20 --steps 2000000 --seeds 5 --methods $few --settings lunarlander20-goals
    on "$@" mt10 --steps 5000000 --seeds 3 --score success --methods $metaworld --rates 0.0003 0.001 0.003 --trial-steps 1000000
    on "$@" mt10-20M --env-id mt10 --steps 20000000 --seeds 2 --score success --methods varshare-recentred --settings mt10
    [ -z "$own" ] || on "$@" "$which" --env-id "$own" --steps 1000000 --seeds 10 --methods $few --trials 12 --trial-steps 500000 --best 3
}

on() { # what, which ("" is all), then a line of the table above
    local what=$1 which=$2 code=0
    shift 2
    [ -z "$which" ] || [ "$which" = "$1" ] || return 0
    [ "$what" != name ] || { echo "$1" && return; }
    [ "${what%% *}" != search ] || set -- "$@" ${STORAGE:+--storage "$STORAGE"}
    # shellcheck disable=SC2086 # METHODS is a list of words
    python -m bench $what "$@" ${METHODS:+--methods $METHODS} ${SEEDS:+--seeds "$SEEDS"} ${STEPS:+--length "$STEPS"} \
        ${TRIALS:+--trials "$TRIALS"} ${FLAGS:+--flags="$FLAGS"} || code=$?
    [ $code -le 1 ] || exit $code
    [ $code = 0 ] || failed=1 # a run has: the others go on
}

failed=0
study=${1:-} study=${study//-/_}
if [[ $study =~ ^[a-z_]+$ && -e $root/studies/$study/__main__.py ]]; then
    exec python -m "studies.$study" "${@:2}"
fi
case ${1:-} in
    help | -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$root/benchmark.sh" && exit ;;
    portfolio)
        export OUT=$PWD METHODS=${METHODS:-$variants}
        for suite in cartpole-goals-physics10 cartpole-goals10; do bash "$root/benchmark.sh" $suite || failed=1; done
        exit $failed
        ;;
    job) exec python -m bench "$@" ;;
    speed) exec python -m bench.speed "${@:2}" ;;
    search | commands | report | plan) what=$1 which=${2:-} ;;
    *) what="" which=${1:-} ;;
esac
own="" # an environment that is not in the table: its suite has a name that can be a folder's
case $which in *:*) own=$which which=${which//[^A-Za-z0-9._-]/-} ;; esac
names=$(suites name "")
grep -qx "${which:-.*}" <<<"$names" || { echo "benchmark.sh: unknown suite or study $which: bash benchmark.sh help" >&2 && exit 2; }
if [ -n "$what" ]; then
    suites "$what" "$which"
else
    suites plan "$which"
    suites "search --missing" "$which"
    suites runs "$which"
fi
case $what in "" | report) [ -n "$which" ] || { python -m studies.settings && python -m studies.claims; } ;; esac
exit $failed
