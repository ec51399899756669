#!/usr/bin/env bash
# The experiments of the paper: all runs of a group, on this machine or as one Slurm array.
#
#   ./benchmark.sh main              four algorithms on the paper's MuJoCo tasks
#   ./benchmark.sh ablation          DSAC-E, without TEC, without TEC and RES (the paper's Figure 3)
#   ./benchmark.sh rho               DSAC-E on Humanoid with rho from 0.5 to 40
#   ./benchmark.sh --list GROUP      print the commands, one per line
#   ./benchmark.sh --slurm GROUP     submit them with sbatch; further arguments are passed to sbatch
#
# The output of a run is in RUNS/<task>__<algorithm>__<seed>.log. Ctrl-C saves and stops all runs. The same
# command resumes unfinished runs and skips finished ones; a larger STEPS extends finished runs. Variables:
#   TASKS, ALGOS   lists, quoted                         RUNS     directory of the runs (runs)
#   SEEDS          list, quoted (0 1 2 3 4)              ARGS     further arguments of the scripts
#   STEPS          environment steps per run (30000000)  PYTHON   the interpreter (python)
#   JOBS           runs at a time, > 0 (number of cores; with --slurm: no limit)
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} RUNS=${RUNS:-runs} SEEDS=${SEEDS:-0 1 2 3 4} STEPS=${STEPS:-30000000}

list() { # GROUP: prints its commands
    local tasks="Humanoid-v4 Ant-v4 HalfCheetah-v4 Walker2d-v4" algos seed task algo options dir
    case $1 in
    main) tasks+=" Hopper-v4 InvertedDoublePendulum-v4 Swimmer-v4 Pusher-v5" algos="dsac_e dsac_t sac td3" ;;
    ablation) algos="dsac_e dsac_e-no-tec dsac_e-no-tec-no-res" ;;
    rho) tasks="Humanoid-v4" algos=$(printf 'dsac_e-rho-%s ' 0.5 1 5 10 20 30 40) ;;
    *) echo "usage: ./benchmark.sh [--list | --slurm] main | ablation | rho" >&2 && exit 2 ;;
    esac
    for seed in $SEEDS; do for task in ${TASKS:-$tasks}; do for algo in ${ALGOS:-$algos}; do
        options=${algo#"${algo%%-*}"} # -no-tec, -rho-5: the arguments of a variant
        options=${options//-no-/ --no-} options=${options//-rho-/ --rho }
        dir="$RUNS/${task//[\/:]/-}__${algo}__$seed"
        printf '%q %s.py --env-id %s --seed %s%s --total-timesteps %s %s--run-dir %q >>%q 2>&1\n' \
            "$PYTHON" "${algo%%-*}" "$task" "$seed" "$options" "$STEPS" "${ARGS:+$ARGS }" "$dir" "$dir.log"
    done; done; done
}

run() { # runs the commands, JOBS at a time
    local cores stopped="" pids=() i code failed=0
    cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu) JOBS=${JOBS:-$cores} # macOS: no nproc
    export OMP_NUM_THREADS=$((cores > JOBS ? cores / JOBS : 1))
    # The runs ignore the terminal's SIGINT, as all background commands do. After SIGTERM they save and exit.
    trap 'stopped=1; echo "stopping: all runs are being saved"' INT TERM HUP
    for i in "${!commands[@]}"; do
        while (($(jobs -pr | wc -l) >= JOBS)) && [[ ! $stopped ]]; do sleep 0.5 || true; done
        [[ ! $stopped ]] || break
        echo "$(date +%H:%M) $((i + 1)) of ${#commands[@]}: ${commands[i]}"
        bash -c "exec ${commands[i]}" &
        pids+=($!)
    done
    while [[ $(jobs -pr) ]]; do
        [[ ! $stopped ]] || kill -TERM $(jobs -pr) 2>/dev/null || true
        sleep 0.5 || true
    done
    for i in "${!pids[@]}"; do
        wait "${pids[i]}" && continue || code=$?
        [[ $stopped && $code == 143 ]] || { failed=1 && echo "failed with exit code $code: ${commands[i]}"; }
    done
    [[ ! $stopped ]] || { echo "stopped; the same command continues" && exit 130; }
    return $failed
}

if [[ ${1:-} == --task ]]; then # one task of the array: after USR1 it saves and requeues itself
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} requeue=""
    trap 'requeue=""; kill -TERM $pid 2>/dev/null' TERM && trap 'requeue=1; kill -TERM $pid' USR1
    bash -c "exec $(sed -n "${SLURM_ARRAY_TASK_ID}p" "$2")" & pid=$!
    while code=0 && { wait $pid || code=$?; } && kill -0 $pid 2>/dev/null; do :; done
    [[ ! $requeue ]] || scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    exit $code
fi
[[ ${1:-} == --list || ${1:-} == --slurm ]] && mode=$1 && shift
[[ (${mode:-} == --slurm || $# -le 1) && ${JOBS:-1} == [1-9]* ]] || set -- "" # prints the usage
lines=$(list "${1:-}")
commands=() && while read -r line; do commands+=("$line"); done <<<"$lines" # mapfile needs bash 4
[[ ${mode:-} != --list ]] || { echo "$lines" && exit; }
mkdir -p "$RUNS"
[[ ${mode:-} == --slurm ]] || { run && exit || exit $?; }
file=$(mktemp "$RUNS/slurm-$1-XXXXXX") && echo "$lines" >"$file"
# Two minutes before the time limit Slurm sends USR1 to the batch script. At scancel it sends TERM.
sbatch --array="1-${#commands[@]}${JOBS:+%$JOBS}" --requeue --signal=B:USR1@120 --open-mode=append \
    --output="$RUNS/slurm-%A_%a.out" --job-name="$1" "${@:2}" --wrap "exec ./benchmark.sh --task '$file'"
