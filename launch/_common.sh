# shellcheck shell=bash
# What the launchers share; they source it. They all take, from the environment:
#
#   SCALE            paper (default): the published recipe, 2^20 updates
#                    cpu: the data set's own images at 16 pixels, 1,000 labels in place of each number, a small
#                    network, 2,500 updates: for two CPU cores
#                    smoke: the same grid in minutes, offline: 8 updates on the bundled digits IN PLACE OF the data set.
#                    It shows that a launcher works, and nothing else
#   DATA_DIR         where the data set lies (default: it comes from the hub)
#   OUTPUT           folder of the runs and the table (default: output/<launcher>/<scale> of the repository)
#   SEEDS            default: "0 1 2"
#   DRY_RUN=1        print the exact commands, one a line, and run nothing
#   NUM_PROCESSES    processes of a run (default: 1), which share the batch of the recipe. One runs as plain python,
#                    more by `accelerate launch --multi_gpu --num_processes N`
#   ACCELERATE_ARGS  options of `accelerate launch` in place of --multi_gpu; no spaces within one
#   JOBS             runs at a time (default: 1), for a CPU with cores to spare; each then logs to <run>/train.log
#   KEEP_GOING=1     go on after a failed run, instead of stopping
#   ONLY             N: the N-th run of the grid alone, from 1. report: the table of the runs that are finished
#   COUNT=1          print the number of runs in the grid, and run nothing
#
# Arguments of a launcher go to every run, last, so that they win (but --global-batch-size and other ways to draw the
# labels exclude the recipe's -b and --num-labels; with NUM_PROCESSES -b is per process). A run that is finished is
# skipped, one that was broken off goes on from its newest checkpoint. A signal (Ctrl-C, TERM, USR1) stops the runs, and
# the launcher ends with status 75, as runs do that can be resumed.

set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
launcher=$(basename -- "$0" .sh)
user=("$@")
SCALE=${SCALE:-paper}
SEEDS=${SEEDS:-0 1 2}
NUM_PROCESSES=${NUM_PROCESSES:-1}
JOBS=${JOBS:-1}
ONLY=${ONLY:-}

# The scales. A launcher adds the data set and, in the paper's scale, its network and weight decay.
paper=(-b 64 --mu 7 --epochs 1024 --train-steps-per-epoch 1024)
cpu=(
    --img-size 16 --model wide_resnet10_1 --bn-momentum 0.05 --model-ema-warmup -b 32 --mu 2 --epochs 10
    --train-steps-per-epoch 250 --stat-momentum 0.99 --calmix-warmup-epochs 2 --workers 0 --device cpu
)
cpu_labels=1000
smoke=(
    --model wide_resnet10_1 --bn-momentum 0.1 --model-ema-warmup -b 4 --mu 2 --epochs 2 --train-steps-per-epoch 4
    --calmix-warmup-epochs 1 --log-interval 4 --workers 0 --device cpu
)

fail() {
    echo "$launcher.sh: error: $1" >&2
    exit 2
}

# value_of FLAG ARGUMENTS...: sets `value` to what follows the flag's last occurrence, or to nothing.
value_of() {
    local flag=$1 previous='' argument
    shift
    value=
    for argument; do
        if [ "$previous" = "$flag" ]; then value=$argument; fi
        case $argument in "$flag"=*) value=${argument#*=} ;; esac
        previous=$argument
    done
}

case $SCALE:$launcher in
    paper:* | cpu:* | smoke:*) OUTPUT=${OUTPUT:-"$here/output/$launcher/$SCALE"} ;;
    own:quickstart) OUTPUT=${OUTPUT:-"$here/output/$launcher"} ;;
    *) fail "SCALE=$SCALE: expected paper, cpu or smoke" ;;
esac
for number in "NUM_PROCESSES=$NUM_PROCESSES" "JOBS=$JOBS"; do
    case ${number#*=} in '' | *[!0-9]* | 0*) fail "$number: expected 1 or more" ;; esac
done
for taken in --output:OUTPUT --experiment:OUTPUT --resume:OUTPUT; do
    value_of "${taken%:*}" ${user[@]+"${user[@]}"}
    if [ -n "$value" ]; then fail "${taken%:*}: every run has its own; set ${taken#*:} instead"; fi
done
# One thread a run: such networks are too small to share out.
if [ "$SCALE" != paper ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

if [ "$NUM_PROCESSES" = 1 ] && [ -z "${ACCELERATE_ARGS:-}" ]; then
    launch=(python)  # as `accelerate launch`, which would turn every exit status into 1
else
    # Without --multi_gpu, Accelerate silently starts one process where it finds no second GPU.
    # shellcheck disable=SC2206
    launch=(accelerate launch ${ACCELERATE_ARGS:---multi_gpu} --num_processes "$NUM_PROCESSES")
fi

# dataset NAME FLAGS...: the data set; the flags are the paper's network and weight decay for it.
dataset() {
    local name=$1
    shift
    case $SCALE in
        paper) recipe=(--dataset "$name" "$@" "${paper[@]}") ;;
        cpu) recipe=(--dataset "$name" "${cpu[@]}") ;;
        smoke) recipe=(--dataset digits "${smoke[@]}") ;;
    esac
    if [ -n "${DATA_DIR:-}" ] && [ "$SCALE" != smoke ]; then recipe+=(--data-dir "$DATA_DIR"); fi
}

# labels N...: the numbers of labels at this scale; those of smoke stand for the paper's first, second and third.
labels() {
    case $SCALE in
        paper) echo "$@" ;;
        cpu) echo "$cpu_labels" ;;
        smoke) echo 20 40 100 | cut -d ' ' -f "1-$#" ;;
    esac
}

# base_methods SUFFIX FLAGS...: FixMatch, FlexMatch and SoftMatch with these flags, alone and with CalibrateMix.
base_methods() {
    local suffix=$1 algorithm seed
    shift
    for algorithm in fixmatch flexmatch softmatch; do
        for seed in $SEEDS; do
            run "$algorithm$suffix-seed$seed" "$@" --algorithm "$algorithm" --seed "$seed"
        done
        for seed in $SEEDS; do
            run "$algorithm+calibratemix$suffix-seed$seed" "$@" --algorithm "$algorithm" --seed "$seed" --calibratemix
        done
    done
}

# of_1024 N: N of the paper's 1024 epochs, in proportion, in epochs of this launch.
of_1024() {
    value_of --epochs "${recipe[@]}" ${user[@]+"${user[@]}"}
    awk "BEGIN { printf \"%g\", $1 * $value / 1024 }"
}

runs=() pids=() names=() keys=() began=() told=() over=()
count=0 running=0 stopped='' interrupted='' failed='' status_of_failed=0

# The runs in progress are told to stop, which can be resumed; once, as a second signal would end them as they are.
stop_runs() {
    local i
    for ((i = 0; i < ${#pids[@]}; i++)); do
        if [ -n "${over[i]:-}${told[i]:-}" ]; then continue; fi
        told[i]=1
        if [ "${launch[0]}" = accelerate ] && [ "$NUM_PROCESSES" = 1 ]; then
            pkill -TERM -P "${pids[i]}" || true  # accelerate does not pass it on to its only child
        else
            kill -TERM "${pids[i]}" 2> /dev/null || true
        fi
    done
}
trap 'interrupted=1 stopped=1 told=(); stop_runs' INT TERM HUP USR1  # a second one is passed on too

# Waits for a run in progress, whichever ends first; bash 3.2 cannot be asked for that, so that several are looked at in
# turn.
reap() {
    local status=0 i name
    while :; do
        for ((i = 0; i < ${#pids[@]}; i++)); do
            if [ -n "${over[i]:-}" ]; then continue; fi
            if [ "$running" -eq 1 ] || ! kill -0 "${pids[i]}" 2> /dev/null; then break 2; fi
        done
        sleep 0.2 || true  # Ctrl-C ends it too
    done
    name=${names[i]}
    while :; do
        interrupted='' status=0
        wait "${pids[i]}" 2> /dev/null || status=$?
        if [ -z "$interrupted" ]; then break; fi  # else the wait was cut short by a signal
    done
    over[i]=1 running=$((running - 1))
    if [ "$status" -eq 0 ]; then
        printf '%s\n' "${keys[i]}" > "$OUTPUT/$name/finished"
        echo "$launcher.sh: $name took $((SECONDS - began[i])) s" >&2
    elif [ "$status" -eq 75 ]; then
        stopped=1
    elif [ -z "$stopped" ]; then
        echo "$launcher.sh: error: $name failed with status $status" >&2
        if [ "$JOBS" -gt 1 ]; then tail -n 5 "$OUTPUT/$name/train.log" >&2; fi
        failed="$failed $name"
        if [ "$status_of_failed" -eq 0 ]; then status_of_failed=$status; fi
    fi
    if [ -n "$stopped" ]; then quit 75; fi
    if [ -n "$failed" ] && [ -z "${KEEP_GOING:-}" ]; then quit "$status_of_failed"; fi
}

# quit STATUS: stops what is in progress, waits for it and ends the launcher.
quit() {
    local i
    stop_runs
    for ((i = 0; i < ${#pids[@]}; i++)); do
        if [ -n "${over[i]:-}" ]; then continue; fi
        while kill -0 "${pids[i]}" 2> /dev/null; do wait "${pids[i]}" 2> /dev/null || true; done
    done
    echo "$launcher.sh: stopped; the same command goes on where this one ended" >&2
    exit "$1"
}

print_command() {
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
}

# A command without the flags that say where and how it runs, and not what: a table goes on after its data moved.
without_machine() {
    local flags='--data-dir|--workers|--device|--log-interval|--dist-timeout'
    sed -E "s/ (-j[ =]?|($flags)[ =])(\\\\.|[^ \\\\])+//g; s/ --(no-)?pin-mem//g"
}

# run_seeds NAME FLAGS...: a run for each of $SEEDS, named NAME-seed and the seed.
run_seeds() {
    local name=$1 seed
    shift
    for seed in $SEEDS; do
        run "$name-seed$seed" "$@" --seed "$seed"
    done
}

# run NAME FLAGS...: one run of the grid.
run() {
    local name=$1 key
    shift
    count=$((count + 1))
    runs+=("$OUTPUT/$name")
    value_of --seed "$@"
    if [ -n "$value" ]; then
        value_of --seed ${user[@]+"${user[@]}"}
        if [ -n "$value" ]; then fail "--seed $value: the grid has its own seeds; set SEEDS=\"$value\" instead"; fi
    fi
    local command=("${launch[@]}" "$here/train_ssl.py" "${recipe[@]}" "$@")
    if [ "$NUM_PROCESSES" -gt 1 ]; then
        value_of -b "${recipe[@]}" "$@"
        if [ $((value % NUM_PROCESSES)) -ne 0 ]; then fail "NUM_PROCESSES=$NUM_PROCESSES does not divide -b $value"; fi
        command+=(-b $((value / NUM_PROCESSES)))
    fi
    # Only now, so that a mistake is told before an array of tasks is submitted that would all make it.
    if [ -n "${COUNT:-}" ] || { [ -n "$ONLY" ] && [ "$ONLY" != "$count" ]; }; then return; fi
    command+=(--output "$OUTPUT" --experiment "$name" --resume auto ${user[@]+"${user[@]}"})
    if [ -n "${DRY_RUN:-}" ]; then
        print_command "${command[@]}"
        return
    fi

    # What a run was made with; reading it costs less than starting python.
    key=$(print_command "${recipe[@]}" "$@" ${user[@]+"${user[@]}"})
    if [ -f "$OUTPUT/$name/finished" ] && [ -f "$OUTPUT/$name/last/metrics.json" ]; then
        if [ "$(without_machine < "$OUTPUT/$name/finished")" = "$(without_machine <<< "$key")" ]; then
            echo "$launcher.sh: $name is finished" >&2
            return
        fi
        fail "$OUTPUT/$name was made with other flags (they are in its file finished); set another OUTPUT, or remove it"
    fi
    if [ -n "$stopped" ]; then quit 75; fi
    mkdir -p "$OUTPUT/$name"
    echo "$launcher.sh: $name" >&2
    if [ "$JOBS" -gt 1 ]; then
        "${command[@]}" >> "$OUTPUT/$name/train.log" 2>&1 &
    else
        "${command[@]}" > /dev/null &
    fi
    names+=("$name") keys+=("$key") began+=("$SECONDS") running=$((running + 1))
    pids+=($!)
    if [ -n "$stopped" ]; then stop_runs; fi  # a signal came before its number was known
    while [ "$running" -ge "$JOBS" ]; do reap; done
}

# after COMMAND...: what follows when all runs are done.
after() {
    while [ "$running" -gt 0 ]; do reap; done
    if [ -n "$stopped" ]; then quit 75; fi
    if [ -n "${COUNT:-}" ] || { [ -n "$ONLY" ] && [ "$ONLY" != report ]; }; then return; fi
    if [ -n "${DRY_RUN:-}" ]; then
        print_command "$@"
    else
        "$@"
    fi
}

# report FLAGS...: the table, at the end of a launcher.
report() {
    after python "$here/report.py" "${runs[@]}" --output "$OUTPUT" "$@"
    if [ -n "${COUNT:-}" ]; then echo "$count"; fi
    case $ONLY in
        '' | report) ;;
        *[!0-9]* | 0*) fail "ONLY=$ONLY: expected report, or 1 to $count" ;;
        *) if [ "$ONLY" -gt "$count" ]; then fail "ONLY=$ONLY: expected report, or 1 to $count"; fi ;;
    esac
    if [ -n "$failed" ]; then
        echo "$launcher.sh: error: failed:$failed" >&2
        exit "$status_of_failed"
    fi
}
