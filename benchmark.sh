#!/usr/bin/env bash
# The experiments of the paper: all runs of a group, on this machine or as one Slurm array.
#
#   ./benchmark.sh main              four algorithms on the paper's MuJoCo tasks
#   ./benchmark.sh ablation          DSAC-E, without TEC, without TEC and RES (the paper's Figure 3)
#   ./benchmark.sh rho               DSAC-E on Humanoid with rho from 0.5 to 40
#   ./benchmark.sh --list GROUP      print the commands, one per line
#   ./benchmark.sh --slurm GROUP     submit them with sbatch; further arguments are passed to sbatch
#
# Variables replace the tasks and variants of a group. A variant is a script with any of its options:
#   TASKS="Ant-v4 Hopper-v4" ALGOS="dsac_e --center-entropy; dsac_e --rho 2; sac" ./benchmark.sh main
# Further variables, with their defaults:
#   SEEDS   list (0 1 2 3 4)                         RUNS     directory of the runs (runs)
#   STEPS   environment steps per run (30000000)     PYTHON   the interpreter (python)
#   JOBS    runs at a time, > 0 (number of cores; with --slurm: no limit)
# A run is in RUNS/<task>__<variant>__<seed>, for example runs/Ant-v4__dsac_e-rho-2__0, and its output in the
# file of the same name with .log. Ctrl-C saves and stops all runs. The same command resumes unfinished runs
# and skips finished ones; a larger STEPS extends finished runs.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs}
SEEDS=${SEEDS:-0 1 2 3 4}
STEPS=${STEPS:-30000000}

list() { # GROUP: prints its commands
    local tasks="Humanoid-v4 Ant-v4 HalfCheetah-v4 Walker2d-v4" variants seed task variant script name dir
    case "$*" in
    main)
        tasks+=" Hopper-v4 InvertedDoublePendulum-v4 Swimmer-v4 Pusher-v5"
        variants="dsac_e; dsac_t; sac; td3" ;;
    ablation) variants="dsac_e; dsac_e --no-tec; dsac_e --no-tec --no-res" ;;
    rho)
        tasks="Humanoid-v4"
        variants=$(printf 'dsac_e --rho %s;' 0.5 1 2 5 10 20 30 40) ;;
    *)
        echo "usage: ./benchmark.sh [--list | --slurm] main | ablation | rho" >&2
        exit 2 ;;
    esac
    # One variant per line. "$1 = $1" leaves single spaces between its words, NF skips empty ones.
    variants=$(awk -v RS=';' 'NF { $1 = $1; print }' <<<"${ALGOS:-$variants}")
    for seed in $SEEDS; do
        for task in ${TASKS:-$tasks}; do
            while read -r variant; do
                script=${variant%% *}
                name=${task}__${variant// --/-}__$seed
                dir=$RUNS/${name//[ =:\/]/-}
                printf '%q %s.py --env-id %s --seed %s --total-timesteps %s --run-dir %q%s >>%q 2>&1\n' \
                    "$PYTHON" "$script" "$task" "$seed" "$STEPS" "$dir" "${variant#"$script"}" "$dir.log"
            done <<<"$variants"
        done
    done
}

run() { # COMMANDS: runs them, JOBS at a time; returns 130 if stopped, else the exit code of a failed run or 0
    set +e # an error, such as that of echo after the terminal was closed, must not end this script
    local line commands=() next=0 pids=() i code failed=0
    while read -r line; do commands+=("$line"); done <<<"$1" # mapfile needs bash 4, macOS has 3.2
    # There is no $(...) below the traps, because bash 5.2 may lose a signal that arrives in one.
    stopped=""
    trap 'interrupted=1; stopped=USR1' USR1
    trap 'interrupted=1; stopped=TERM; echo "stopping: all runs are being saved"' INT TERM HUP
    while true; do
        for i in "${!pids[@]}"; do
            # The runs ignore the SIGINT of Ctrl-C, as all background commands do. After SIGTERM they save and
            # exit; a second one interrupts an environment that hangs.
            if [[ $stopped ]]; then kill -TERM "${pids[i]}" 2>/dev/null; fi
            if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
            interrupted=1
            while [[ $interrupted ]]; do # a trapped signal ends wait, which then returns 128 + its number
                interrupted=""
                wait "${pids[i]}"
                code=$?
            done
            unset "pids[i]"
            if [[ $stopped && ($code == 143 || $code == 129) ]]; then code=0; fi # saved after SIGTERM, SIGHUP
            if ((code > 0)); then
                failed=$code
                echo "failed with exit code $code: ${commands[i]}"
            fi
        done
        if [[ ! $stopped ]] && ((next < ${#commands[@]} && ${#pids[@]} < JOBS)); then
            date "+%H:%M $((next + 1)) of ${#commands[@]}: ${commands[next]}"
            bash -c "exec ${commands[next]}" &
            pids[next]=$!
            next=$((next + 1))
        elif ((${#pids[@]} > 0)); then
            sleep 0.5
        else
            break
        fi
    done
    if [[ ! $stopped ]]; then return "$failed"; fi
    echo "stopped; the same command resumes the runs"
    return 130
}

if [[ ! ${JOBS:-1} =~ ^[1-9][0-9]*$ ]]; then list; fi # prints the usage
case ${1:-} in
--list) list "${@:2}" ;;
--slurm)
    lines=$(list "${2:-}")
    mkdir -p "$RUNS"
    file=$(mktemp "$RUNS/slurm-$2-XXXXXX")
    echo "$lines" >"$file"
    # Two minutes before the time limit Slurm sends USR1 to the batch script. At scancel it sends TERM, and
    # KILL after its KillWait, which must be longer than a save.
    sbatch --array="1-$(grep -c "" "$file")${JOBS:+%$JOBS}" --requeue --signal=B:USR1@120 --open-mode=append \
        --output="$RUNS/slurm-%A_%a.out" --job-name="$2" "${@:3}" \
        --wrap "exec ./benchmark.sh --task $(printf %q "$file")" ;;
--task) # one task of the array; the second argument is the file of the commands
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
    JOBS=1
    code=0
    run "$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$2")" || code=$?
    if [[ $stopped == USR1 ]]; then scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
    exit "$code" ;;
*)
    lines=$(list "$@")
    mkdir -p "$RUNS"
    cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu) # macOS has no nproc
    JOBS=${JOBS:-$cores}
    export OMP_NUM_THREADS=$((cores > JOBS ? cores / JOBS : 1))
    run "$lines" ;;
esac
