#!/usr/bin/env bash
# The paper's experiments: all runs of a group, on this machine or on a Slurm cluster.
#
#   ./benchmark.sh main              four algorithms on the paper's tasks
#   ./benchmark.sh ablation          DSAC-E, without TEC, and without TEC and RES (Figure 3)
#   ./benchmark.sh rho               DSAC-E on Humanoid with budgets from rho = 0.5 to 40
#   ./benchmark.sh --list GROUP      print the commands instead, one per line, for any scheduler
#   ./benchmark.sh --slurm GROUP     submit them as one Slurm array job; what follows goes to sbatch
#
# Each run has its directory RUNS/<task>__<algorithm>__<seed>, and its output in a .log beside it. Ctrl-C saves all runs
# and stops. Started again with the same words it skips what is finished and goes on with the rest; so does each of the
# listed commands. A larger STEPS goes on with finished runs; other ARGS need other RUNS. What these variables change:
#
#   TASKS, ALGOS, SEEDS   lists in quotes             RUNS     directory of the runs (runs)
#   STEPS                 environment steps per run   ARGS     more arguments for every run: "--eval-interval 25000"
#   JOBS                  runs at a time              PYTHON   the interpreter (python)
set -euo pipefail
cd "$(dirname "$0")"

fail() {
    echo "benchmark.sh: $1" >&2
    exit 2
}

choose() { # GROUP: what it contains, where the variables do not say otherwise
    case $1 in
    main)
        TASKS=${TASKS:-Humanoid-v4 Ant-v4 HalfCheetah-v4 Walker2d-v4 Hopper-v4 InvertedDoublePendulum-v4 Swimmer-v4 Pusher-v5}
        ALGOS=${ALGOS:-dsac_e dsac_t sac td3}
        ;;
    ablation)
        TASKS=${TASKS:-Humanoid-v4 Ant-v4 HalfCheetah-v4 Walker2d-v4}
        ALGOS=${ALGOS:-dsac_e dsac_e-no-tec dsac_e-no-tec-no-res}
        ;;
    rho)
        TASKS=${TASKS:-Humanoid-v4}
        ALGOS=${ALGOS:-dsac_e-rho-0.5 dsac_e-rho-1 dsac_e-rho-5 dsac_e-rho-10 dsac_e-rho-20 dsac_e-rho-30 dsac_e-rho-40}
        ;;
    *) fail "the groups are main, ablation and rho, not '$1'" ;;
    esac
    SEEDS=${SEEDS:-0 1 2 3 4} STEPS=${STEPS:-30000000} RUNS=${RUNS:-runs}
    [[ $RUNS =~ ^[A-Za-z0-9_./-]+$ ]] || fail "RUNS must be a path without spaces or signs, not '$RUNS'"
    [[ ${ARGS:-} != *$'\n'* ]] || fail "ARGS must be one line"
    [[ $STEPS =~ ^[1-9][0-9]*$ ]] || fail "STEPS must be a whole number such as 610000, not '$STEPS'"
    [[ ${JOBS:-1} =~ ^[1-9][0-9]*$ ]] || fail "JOBS must be a whole number such as 2, not '$JOBS'"
    command -v flock >/dev/null || fail "flock is missing: install util-linux"
    local seed task algo options
    for seed in $SEEDS; do
        for task in $TASKS; do
            for algo in $ALGOS; do
                [[ $algo =~ ^(dsac_e|dsac_t|sac|td3)((-no-tec|-no-res|-rho-[0-9.]+)*)$ ]] ||
                    fail "ALGOS are dsac_e, dsac_t, sac, td3 and, for instance, dsac_e-no-tec and dsac_e-rho-5, not '$algo'"
                options=${BASH_REMATCH[2]//-no-/ --no-}
                commands+=("./benchmark.sh --run $RUNS/${task}__${algo}__$seed ${BASH_REMATCH[1]}.py --env-id $task --seed $seed\
${options//-rho-/ --rho }${ARGS:+ $ARGS} --total-timesteps $STEPS")
            done
        done
    done
}

say() { # a line that stays, above the one that changes
    [[ ! -t 1 ]] || printf '\r\033[K'
    echo "$(date +%H:%M)  $*"
}

finished() { # DIRECTORY STEPS
    local made=""
    [[ ! -f $1/finished ]] || made=$(<"$1/finished")
    [[ $made =~ ^[0-9]+$ && $made -ge $2 ]] # -ge alone would execute what a stranger's file holds
}

run() { # DIRECTORY SCRIPT ARGUMENTS... STEPS: starts the run, goes on with it, or sees that it is finished
    local dir=$1 steps=${*: -1} name=${1##*/} pid="" status=127 code signalled="" told="" requeue="" before last
    shift
    mkdir -p "$(dirname "$dir")"
    exec 9>>"$dir.log" # and a lock, which python inherits: it holds as long as anything of this run lives
    flock -n 9 || { say "$name: left alone, it is running already" && return 1; }
    finished "$dir" "$steps" && return
    if [[ -f $dir/checkpoint.pt ]]; then
        say "$name: goes on"
        set -- "$@" --resume "$dir"
    elif [[ -f $dir/finished ]]; then
        say "$name: left alone, it is finished at step $(<"$dir/finished") and its checkpoint gone" && return 1
    else
        say "$name: starts"
        rm -f "$dir"/{events.out.tfevents.*,policy.pt,replay-*,*.tmp} # of a run killed before its first checkpoint
        set -- "$@" --run-dir "$dir"
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    before=$(stat -c %s "$dir.log")
    # Passed on once: a second SIGTERM, seconds later, would end the run where it stands. Slurm sends USR1.
    trap 'signalled=1; [[ $told ]] || kill -TERM $pid 2>/dev/null || true; told=$pid' INT TERM HUP
    trap 'signalled=1; requeue=1; [[ $told ]] || kill -TERM $pid 2>/dev/null || true; told=$pid' USR1
    (trap '' HUP && exec "${PYTHON:-python}" "$@" >&9 2>&1) & # a closed terminal reaches it through the trap above
    pid=$!
    [[ ! $signalled ]] || kill -TERM $pid # what came before there was a process
    while kill -0 $pid 2>/dev/null; do wait $pid && status=0 || status=$?; done # a signal ends wait, but not the run
    wait $pid 2>/dev/null && code=0 || code=$? # in that case status is the signal's: ask again
    ((code == 127)) || status=$code # 127: bash has told it already
    last=$(tail -c "+$((before + 1))" "$dir.log" | grep -v -E '^(evaluate|curves|go on):|^╰' | tail -n 1 || true)
    if [[ $status == 0 || $last == *"has made its"* ]]; then
        echo "$steps" >"$dir/finished"
        say "$name: $last"
    elif ((status == 130 || status == 143)); then # SIGINT, SIGTERM
        say "$name: ${last:-interrupted before its first step}"
        # Not $SLURM_JOB_ID: for one task of an array that is the number of the array, and would requeue all of it.
        [[ ! $requeue ]] || scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
        return "$status"
    else
        say "$name: FAILED with exit code $status, see $dir.log: $last"
        return 1
    fi
}

declare -A running=() # process: directory
failed=0 ended=0 total=0

progress() { # one line, where there is a terminal: the step of what runs
    [[ -t 1 ]] || return 0
    local dir line="$ended of $total"
    for dir in "${running[@]}"; do
        line+="  ${dir##*/} $(grep -so '^step [0-9]*' "$dir.log" | tail -n 1 || true)"
    done
    printf '\r\033[K%s' "${line:0:$(tput cols 2>/dev/null || echo 80)}"
}

await() { # until fewer than $1 are running
    local pid
    while :; do
        for pid in "${!running[@]}"; do
            kill -0 "$pid" 2>/dev/null && continue
            wait "$pid" || failed=1
            unset "running[$pid]"
            ended=$((ended + 1))
        done
        ((${#running[@]} >= $1)) || return 0
        progress
        sleep 1 || true
    done
}

run_all() {
    local command words todo=() cores jobs stopped=""
    for command in "${commands[@]}"; do
        read -ra words <<<"$command"
        finished "${words[2]}" "$STEPS" || todo+=("$command")
    done
    # One thread for each run, as many runs as cores: on two cores that made 1.5 times the updates of one run after the
    # other with two threads each (README, "Experiments").
    cores=$(env -u OMP_NUM_THREADS nproc) # nproc would obey it
    total=${#todo[@]}
    jobs=${JOBS:-$cores}
    jobs=$((jobs < total ? jobs : total))
    say "${#commands[@]} runs, $((${#commands[@]} - total)) finished before; $jobs at a time"
    ((jobs)) || return 0
    export OMP_NUM_THREADS=$((cores > jobs ? cores / jobs : 1))
    trap 'stopped=1; kill -TERM "${!running[@]}" 2>/dev/null || true' INT TERM HUP
    for command in "${todo[@]}"; do
        await "$jobs"
        [[ ! $stopped ]] || break
        read -ra words <<<"$command"
        "${words[@]}" &
        running[$!]=${words[2]}
        [[ ! $stopped ]] || kill -TERM $! # what the signal came just before
    done
    await 1
    [[ ! $stopped ]] || { say "stopped; the same command goes on" && exit 130; }
    return $failed
}

commands=()
case ${1:-} in
--list) choose "${2:-}" && printf '%s\n' "${commands[@]}" ;;
--slurm)
    choose "${2:-}"
    mkdir -p "$RUNS"
    list=$(mktemp "$RUNS/slurm-$2-XXXXXX") # which number is which command, also if this file changes
    printf '%s\n' "${commands[@]}" >"$list"
    # USR1, 90 to 120 s before the time limit: save, and queue again. SIGTERM, of scancel or preemption: save and end.
    sbatch --array="0-$((${#commands[@]} - 1))${JOBS:+%$JOBS}" --requeue --signal=B:USR1@90 --open-mode=append \
        --job-name="$2" --output="$RUNS/slurm-%A_%a.out" "${@:3}" --wrap "exec ./benchmark.sh --task $list"
    ;;
--task) # one of the array
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
    read -ra words < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$2")
    run "${words[@]:2}"
    ;;
--run) run "${@:2}" ;;
-h | --help) sed -n '2,/^set/{/^set/!s/^# \?//p}' "$0" ;;
*) choose "${1:-}" && run_all ;;
esac
