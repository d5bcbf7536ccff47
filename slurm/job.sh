# The part that all job scripts share: each sources this after its settings and env.sh, and then starts its ranks with
#
#   run COMMAND...                one process per task; each can do the work alone (all stages but train)
#   run_together COMMAND...       one process per task; they wait for each other (train)
#   run_torchrun ARGUMENTS...     one torchrun per node, NPROC_PER_NODE processes each
#   run_accelerate ARGUMENTS...   one `accelerate launch` per node, NPROC_PER_NODE processes each
#
# A script may run several steps, one after another; step_size says how much of the job the next ones use. A job that
# begins again goes on with the first step that has not finished.
#
# It returns when the work is done. Otherwise the script ends there, with the exit code of the rank that failed or else
# of srun. If another try makes sense, the job goes back into SLURM's queue first: when it was told to stop (preemption,
# time limit: SIGTERM or SIGUSR2), when a rank failed, was killed or hung. SLURM by itself starts a job again only when
# a node fails or something more important needs its place.
#
# Settings, from the environment:
#   LOGS=$PWD/logs    one log per task, <job name>-<job id>-<task>.log; the lives of a job follow each other in it
#   LIVES=5           give up when so many lives in a row got nothing done: no partition committed, no checkpoint saved
#   WAIT=60           seconds that other tasks have when the first one has finished, before they are killed (0: any)
#   LOOK=30           seconds between two looks for ranks that show no life
#   NPROC_PER_NODE=1  for run_torchrun and run_accelerate
#   CONTAINER         put before each command, for example CONTAINER="apptainer exec image.sif"
#   SRUN_ARGS         more options for srun, for example SRUN_ARGS="--container-image=image.sqsh" (pyxis)
#   BINDS             folders that a container sees besides the checkout and the logs: BINDS=/data,/scratch
#
# The elements of an array (sbatch --array=0-9 slurm/filter.sbatch) share a stage's work: they pass "${ELEMENT[@]}".
# shellcheck shell=bash disable=SC2016,SC2034

[ -n "${SLURM_JOB_ID:-}" ] || { echo "this is a SLURM job: submit it with sbatch" >&2; exit 2; }
: "${LOGS:=$PWD/logs}" "${LIVES:=5}" "${WAIT:=60}" "${LOOK:=30}" "${NPROC_PER_NODE:=1}"
: "${CONTAINER:=}" "${SRUN_ARGS:=}" "${BINDS:=}"
LOGS=$(realpath -m "$LOGS")
: "${SLURM_NTASKS:=$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))}"
# left over from a job around the one that submitted this, they would bind our tasks to its CPUs
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" SLURM_DISTRIBUTION

lm_id=$SLURM_JOB_ID
lm_life=${SLURM_RESTART_COUNT:-0}
lm_steps=0            # that this life has begun
lm_size=()            # options of srun, where a step does not use all of the job
lm_first=0            # number of this job's first rank
lm_ending=""          # whether SLURM is ending this job already
ELEMENT=()
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  lm_id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID alone may mean the whole array to scontrol
  lm_ranks=$((SLURM_NTASKS * NPROC_PER_NODE))
  lm_first=$(((${ARRAY_OFFSET:-0} + SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) * lm_ranks))
  ELEMENT=("rank_offset=$lm_first" "world_size=$((${ARRAY_TOTAL:-$SLURM_ARRAY_TASK_COUNT} * lm_ranks))")
fi

# What the ranks have to say (pipeline/distributed/life.py) goes into a folder for each life and step. A first life
# begins anew: SLURM gives job ids out again when its controller has lost its memory.
lm_logs=$LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID
export LATENTMILL_TASK_OUTPUT=$lm_logs # for launch/status.py: where a rank's log is, and the job's
LATENTMILL_JOB_OUTPUT=$(readlink /proc/$$/fd/1) && export LATENTMILL_JOB_OUTPUT || true
lm_state=$LOGS/.$SLURM_JOB_NAME-$SLURM_JOB_ID
[ "$lm_life" -gt 0 ] || rm -rf "$lm_state"
mkdir -p "$lm_state"

# What every container needs: the checkout, the logs (where ranks say how they ended), the data, the GPUs.
lm_binds=$LATENTMILL_HOME,$LOGS${BINDS:+,$BINDS}
if [[ ${CONTAINER%% *} =~ ^(.*/)?(apptainer|singularity)$ ]]; then
  lm_nv=""
  [[ ${SLURM_GPUS_ON_NODE:-0} = 0 || $CONTAINER =~ \ --(nv|nvccli|rocm)(\ |$) ]] || lm_nv="--nv "
  [[ $CONTAINER =~ \ (exec|run)\  ]] || { echo "CONTAINER=$CONTAINER: expected '… exec [options] image'" >&2; exit 2; }
  CONTAINER=${CONTAINER/"${BASH_REMATCH[0]}"/"${BASH_REMATCH[0]}$lm_nv--bind $lm_binds "}
elif [[ $SRUN_ARGS = *--container-image* ]]; then
  SRUN_ARGS+=" --container-mounts=$lm_binds"
  # enroot shows a container the driver and the devices only where these say so
  [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || export NVIDIA_VISIBLE_DEVICES=${NVIDIA_VISIBLE_DEVICES:-all} \
    NVIDIA_DRIVER_CAPABILITIES=${NVIDIA_DRIVER_CAPABILITIES:-compute,utility}
fi

lm_say() { echo "$(date '+%F %T') job $lm_id, life $lm_life: $*"; }

lm_say "$SLURM_NTASKS tasks on $SLURM_JOB_NODELIST; their logs: $lm_logs-<task>.log"

# ---- starting ranks

run() { lm_run alone "${lm_tasks:-$SLURM_NTASKS}" "${lm_size[@]}" "$@"; }

run_together() { lm_run together "${lm_tasks:-$SLURM_NTASKS}" "${lm_size[@]}" "$@"; }

# Jobs of several stages: what each of them uses of the job.
step_size() { # step_size NODES TASKS-PER-NODE CPUS-PER-TASK: for run and run_together from here on
  lm_tasks=$(($1 * $2))
  lm_size=(--nodes="$1" --ntasks="$lm_tasks" --ntasks-per-node="$2" --cpus-per-task="$3")
  export OMP_NUM_THREADS=$3 MKL_NUM_THREADS=$3
}

# The agents of torchrun and accelerate are deaf to what SLURM sends to every process: ranks get it directly, and have
# all the time until SLURM's SIGKILL to save what they have. (Agents would send it again, and kill them after 30 s.)
run_torchrun() {
  lm_meet
  lm_run together "$((SLURM_NNODES * NPROC_PER_NODE))" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    bash -c 'trap "" TERM USR1 USR2; exec python -m torch.distributed.run --nnodes="$SLURM_NNODES" \
      --node-rank="$SLURM_NODEID" --nproc-per-node="$NPROC_PER_NODE" --master-addr="$MASTER_ADDR" \
      --master-port="$MASTER_PORT" --signals-to-handle=SIGINT "$@"' torchrun "$@"
}

run_accelerate() {
  lm_meet
  lm_run together "$((SLURM_NNODES * NPROC_PER_NODE))" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    bash -c 'trap "" USR1 USR2; exec accelerate launch --multi_gpu --num_machines="$SLURM_NNODES" \
      --machine_rank="$SLURM_NODEID" --num_processes="$((SLURM_NNODES * NPROC_PER_NODE))" --rdzv_backend=static \
      --main_process_ip="$MASTER_ADDR" --main_process_port="$MASTER_PORT" "$@"' accelerate "$@"
}

lm_meet() { # on the first node, and at another port than an earlier life, whose processes may live on unseen
  local nodes
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${nodes[0]} NPROC_PER_NODE
  export MASTER_PORT=$((12000 + (7 * SLURM_JOB_ID + 1009 * lm_life + 101 * lm_steps) % 16000))
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}
}

lm_run() { # lm_run alone|together RANKS [SRUN-OPTION...] COMMAND...
  local how=$1 ranks=$2 rc=0 options=() srun watcher
  shift 2
  while [[ ${1:-} = --* ]]; do options+=("$1"); shift; done
  local done=$lm_state/$lm_steps.done
  export LATENTMILL_LIFE=$lm_state/$lm_life.$lm_steps
  lm_steps=$((lm_steps + 1))
  if [ -e "$done" ]; then
    lm_say "step $lm_steps was done in an earlier life"
    return 0
  fi
  rm -rf "$LATENTMILL_LIFE"
  mkdir -p "$LATENTMILL_LIFE"
  export TORCH_FR_DUMP_TEMP_FILE=$LATENTMILL_LIFE/flight- # torch adds the rank
  # In the background, because bash acts on a signal only when what it waits for has ended.
  # shellcheck disable=SC2086 # SRUN_ARGS and CONTAINER are several words each
  srun --export=ALL --kill-on-bad-exit=1 --wait="$WAIT" --open-mode=append --output="$LOGS/%x-%j-%t.log" \
    "${options[@]}" $SRUN_ARGS $CONTAINER "$@" &
  srun=$!
  lm_watch "$srun" &
  watcher=$!
  wait "$srun" || rc=$?
  kill "$watcher" 2>/dev/null || true
  : > "$LATENTMILL_LIFE/ended" # and so NFS looks at the folder anew
  lm_judge "$how" "$rc" "$ranks"
  { : > "$done"; } 2>/dev/null || true # without it, another life starts the step again, which finds that all is done
}

# ---- how it ended

lm_judge() { # lm_judge alone|together RC RANKS: return if the work is done, else end the script
  local how=$1 rc=$2 file code codes=" " story
  for file in "$LATENTMILL_LIFE"/*.*; do
    [ ! -e "$file" ] || codes+="${file##*.} "
  done
  [[ $rc != 0 || $codes = *\ [1-9]* ]] || return 0
  story="srun ended with code $rc; $(lm_story "$3")"
  [ "$rc" != 0 ] || rc=1
  for code in $codes; do # srun's is the highest of all, which is rarely that of the rank that failed
    [[ ! $code =~ ^[0-9]+$ || $code =~ ^(0|75|76)$ ]] || rc=$code
  done
  if [[ $how = alone && $codes = *" 0 "* ]]; then # a rank that finishes has seen the whole work done
    lm_say "done, though $story"
    return 0
  fi
  [[ $codes != *" 2 "* ]] || rc=2
  if [[ $rc =~ ^(2|126|127)$ ]]; then
    lm_say "$story. Not started again: a setting is wrong or something is missing"
    exit "$rc"
  fi
  lm_again "$rc" "$story"
}

lm_story() { # lm_story RANKS: how they ended
  local file name rank words=() failed="" hung="" silent="" stopped=0
  local -A code=()
  for file in "$LATENTMILL_LIFE"/*.*; do
    name=${file##*/}
    [[ ! -e $file || $name = *.alive ]] || code[${name%.*}]=${name##*.}
  done
  for ((rank = lm_first; rank < lm_first + $1; rank++)); do
    case ${code[$rank]:-} in
      0) ;;
      75 | 76) stopped=$((stopped + 1)) ;;
      77) hung+=" $rank" ;;
      "") silent+=" $rank" ;;
      *) failed+=" $rank(${code[$rank]})" ;;
    esac
  done
  [ -z "$failed" ] || words+=("failed (with code):$failed")
  [ -z "$hung" ] || words+=("hung:$hung")
  [ -z "$silent" ] || words+=("killed, lost or frozen:$silent")
  [ "$stopped" = 0 ] || words+=("stopped at a safe boundary: $stopped of $1")
  [ "${#words[@]}" -gt 0 ] || words=("all finished")
  printf -v name '%s; ' "${words[@]}"
  name=${name%; }
  echo "ranks ${name:0:400}"
}

lm_again() { # lm_again RC WHY: another life for this job, unless it gets nowhere; ends the script
  local rc=$1 why=$2 state try fruitless
  trap '' TERM
  fruitless=$(lm_fruitless)
  if [ "$fruitless" -ge "$LIVES" ]; then
    lm_say "$why. Giving up: nothing got done in $fruitless lives in a row (LIVES=$LIVES)"
    exit "$rc"
  fi
  for try in {1..30}; do # the controller may be away for a while
    if state=$(lm_ask); then
      # SIGNALING is RUNNING, seen while SLURM still sends the signal that the ranks may just have died of
      if [[ -z $lm_ending && ! $state =~ JobState=(RUNNING|SIGNALING)" " ]] || ! lm_is_ours "$state"; then
        lm_say "$why. SLURM has ended this life of the job itself"
        exit "$rc"
      fi
      if scontrol requeue "$lm_id"; then
        lm_say "$why. Requeued: it begins again when SLURM finds room, usually not before two minutes"
        exit "$rc"
      fi
    fi
    [ "$try" = 30 ] || sleep 10
  done
  lm_say "$why. It could not be requeued: the same command, or sbatch, goes on where it stopped"
  exit "$rc"
}

lm_ask() { scontrol show job --oneliner "$lm_id" 2>/dev/null; }

# A node that SLURM lost sight of may live on, and this script there, while the job runs again elsewhere.
lm_is_ours() { [[ $1 = *" Restarts=$lm_life "* ]]; } # lm_is_ours WHAT-SLURM-SAYS

lm_fruitless() { # how many lives in a row, this one included, ended without having got anything done
  local life count=0
  for ((life = lm_life; life >= 0; life--)); do
    ! compgen -G "$lm_state/$life.*/saved" > /dev/null || break
    ! compgen -G "$lm_state/$life.*/ended" > /dev/null || count=$((count + 1))
  done
  echo "$count"
}

# Whoever ends this job (scancel, a preemption, a failed node, somebody's requeue) has decided what becomes of it: to
# requeue it now would undo a scancel. Only a job at its time limit whose ranks did not stop in time would be forgotten.
trap lm_terminated TERM
lm_terminated() {
  trap '' TERM
  lm_ending=1
  [ -n "${LATENTMILL_LIFE:-}" ] || exit 143
  if [[ $(lm_ask) = *" Reason=TimeLimit "* ]]; then
    : > "$LATENTMILL_LIFE/ended"
    lm_again 143 "the time limit came before the ranks had stopped"
  fi
  exit 143
}

# A rank whose process is frozen (stopped, or stuck in C or the kernel) cannot say so: its file <rank>.alive grows old.
lm_watch() { # lm_watch PID-OF-SRUN
  local frozen before="" step
  set +e # it goes on looking, whatever fails once
  while sleep "$LOOK"; do
    frozen=$(find "$LATENTMILL_LIFE" -name '*.alive' ! -newermt now -printf ' %f')
    # twice, as after a suspension all look frozen for a moment
    if [ -n "$frozen" ] && [ "$frozen" = "$before" ] && lm_is_ours "$(lm_ask)"; then
      lm_say "no life from ranks${frozen//.alive/}: ending this life. All ranks write where they are into their logs"
      step=$(cat "$LATENTMILL_LIFE"/*.alive | head -n 1)
      scancel --signal=USR1 "$step"
      sleep 2
      scancel --signal=TERM "$step"
      sleep "$LOOK"
      scancel --signal=KILL "$step"
      sleep "$LOOK"
      kill -KILL "$1" # srun may wait for what does not answer any more
      return
    fi
    before=$frozen
  done
}
