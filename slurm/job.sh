# Shared by all job scripts. A script sources this after its settings and env.sh, and then starts its ranks with one of
#
#   run COMMAND...                one process per task, independent of each other (all stages except train)
#   run_together COMMAND...       one process per task, which communicate (train)
#   run_torchrun ARGUMENTS...     one torchrun per node with NPROC_PER_NODE processes
#   run_accelerate ARGUMENTS...   one `accelerate launch` per node with NPROC_PER_NODE processes
#
# A script may run several steps one after another; step_size sets how much of the job the following steps use. A
# requeued job continues with the first step that has not finished.
#
# These return when the work is done. Otherwise they end the script with the exit code of the rank that failed, or that
# of srun. If a retry makes sense, the job is requeued first: after a preemption or at its time limit (SIGTERM or
# SIGUSR2), and after a rank failed, was killed or hung. Nodes that failed while others did not are excluded from the
# next life (nodes.sh). An error that a retry cannot fix (a wrong setting, a full disk) ends the job at once. SLURM
# alone restarts a job only after a node failure or a preemption.
#
# Settings, from the environment:
#   LOGS=$PWD/logs    one log per task, <job name>-<job id>-<task>.log, to which each life of the job appends
#   LIVES=5           give up after this many lives in a row without progress: no partition committed, no checkpoint
#   BAD_NODES=2       at most this many nodes are excluded in all lives together (0: none)
#   WAIT=60           seconds after the first task has finished until the others are killed (0: never)
#   LOOK=30           seconds between two checks for ranks that show no sign of life
#   STAGGER=          seconds over which ranks are started; default: one second per 50 ranks, at most 60
#   NPROC_PER_NODE=1  for run_torchrun and run_accelerate
#   CONTAINER         prefix of each command, for example CONTAINER="apptainer exec image.sif"
#   SRUN_ARGS         additional options of srun, for example SRUN_ARGS="--container-image=image.sqsh" (pyxis)
#   BINDS             folders mounted in a container besides the checkout and the logs: BINDS=/data,/scratch
#   NOTIFY            a URL to which a small JSON message is sent when the job has finished or finally failed
#
# The tasks of an array (sbatch --array=0-9 slurm/filter.sbatch) share the work of a stage: pass "${ELEMENT[@]}".
# For settings that an argument overrides: settings KEY=VALUE... -- "$@", then pass "${SETTINGS[@]}" "$@".
# shellcheck shell=bash disable=SC2016,SC2034

settings() { # settings KEY=VALUE... -- ARGUMENT...: sets SETTINGS to those whose key is not among the arguments
  local word given=" "
  local -a mine=()
  SETTINGS=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do mine+=("$1"); shift; done
  for word in "$@"; do
    word=${word#--}
    word=${word%%=*}
    given+="${word//-/_} "
  done
  for word in ${mine[@]+"${mine[@]}"}; do
    [[ $given = *" ${word%%=*} "* ]] || SETTINGS+=("$word")
  done
}

if [ -n "${LATENTMILL_CHECK:-}" ]; then # on a login node: only report whether the work is done (slurm/pipeline.sh)
  ELEMENT=()
  run() { shift 2; exec python -m launch.finished "$@"; }
  run_together() { run "$@"; }
  run_torchrun() { shift; exec python -m launch.finished "$@"; }
  run_accelerate() { run_torchrun "$@"; }
  return 0
fi

[ -n "${SLURM_JOB_ID:-}" ] || { echo "this is a SLURM job: submit it with sbatch" >&2; exit 2; }
: "${LOGS:=$PWD/logs}" "${LIVES:=5}" "${BAD_NODES:=2}" "${WAIT:=60}" "${LOOK:=30}" "${STAGGER:=}" "${NPROC_PER_NODE:=1}"
: "${NOTIFY:=}"
export -n NOTIFY # it may hold a secret, and ranks do not need it
LOGS=$(realpath -m "$LOGS")
: "${SLURM_NTASKS:=$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))}"
# inherited from the job that submitted this one, they would bind our tasks to its CPUs
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" SLURM_DISTRIBUTION

lm_id=$SLURM_JOB_ID
lm_life=${SLURM_RESTART_COUNT:-0}
lm_steps=0            # steps begun in this life
lm_size=()            # options of srun if a step does not use the whole job
lm_first=0            # number of this job's first rank
lm_ending=""          # whether SLURM is already ending this job
lm_last=""            # whether the last line was printed
ELEMENT=()
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  lm_id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID alone may mean the whole array to scontrol
  lm_ranks=$((SLURM_NTASKS * NPROC_PER_NODE))
  lm_first=$(((${ARRAY_OFFSET:-0} + SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) * lm_ranks))
  lm_world=$((${ARRAY_TOTAL:-$SLURM_ARRAY_TASK_COUNT} * lm_ranks))
  ELEMENT=("rank_offset=$lm_first" "world_size=$lm_world")
fi

lm_say() { printf '%s job %s, life %s: %s\n' "$(date '+%F %T')" "$lm_id" "$lm_life" "$*" 2>/dev/null || true; }

# ---- folders: a job does not fail because its logs cannot be written

# Reports of the ranks (pipeline/config/life.py): one folder for each life and step. The first life removes what it
# finds: SLURM reuses job ids when its controller has lost its state.
lm_logs=$LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID
export LATENTMILL_TASK_OUTPUT=$lm_logs # for launch/status.py: where the logs of ranks and of the job are
LATENTMILL_JOB_OUTPUT=$(readlink /proc/$$/fd/1) && export LATENTMILL_JOB_OUTPUT || true
lm_state=$LOGS/.$SLURM_JOB_NAME-$SLURM_JOB_ID
lm_writable() { mkdir -p "$LOGS" "$lm_state" 2>/dev/null && { : > "$lm_state/life"; } 2>/dev/null; }
lm_note() { { printf '%s\n' "$2" > "$lm_state/$1"; } 2>/dev/null || true; } # lm_note NAME VALUE: for later lives
lm_noted() { cat "$lm_state/$1" 2>/dev/null || true; }

# shellcheck source=slurm/container.sh
source "$LATENTMILL_HOME/slurm/container.sh"

[ "$lm_life" -gt 0 ] || rm -rf "$lm_state" 2>/dev/null || true
if compgen -G "$lm_state/$((lm_life - 1)).*/saved" > /dev/null; then lm_note fruitless 0; fi
lm_writable || lm_say "WARNING: $LOGS cannot be written: the work continues, without logs of single ranks"

source "$LATENTMILL_HOME/slurm/nodes.sh"

# Recreate the logs folder if it was deleted while the job ran. (SLURM fails a job whose .out file has no folder.)
lm_keep_folders() {
  local deleted=""
  [ -d "$LATENTMILL_LIFE" ] || deleted=1
  mkdir -p "$LATENTMILL_LIFE" "$(dirname "${LATENTMILL_JOB_OUTPUT:-$LOGS/x}")" 2>/dev/null || return 0
  if [[ ${LATENTMILL_JOB_OUTPUT:-} = /* && ! /proc/$BASHPID/fd/1 -ef $LATENTMILL_JOB_OUTPUT ]]; then
    { : >> "$LATENTMILL_JOB_OUTPUT"; } 2>/dev/null && exec >> "$LATENTMILL_JOB_OUTPUT" 2>&1
  fi
  [ -z "$deleted" ] ||
    lm_say "WARNING: the folder of the logs was deleted while the job runs: what it held is lost, the work continues"
}

# ---- starting ranks

run() { lm_each=1 lm_run alone "${lm_tasks:-$SLURM_NTASKS}" "${lm_size[@]}" "$@"; }

run_together() { lm_each=1 lm_run together "${lm_tasks:-$SLURM_NTASKS}" "${lm_size[@]}" "$@"; }

# Jobs of several stages: the part of the job that each of them uses.
step_size() { # step_size NODES TASKS-PER-NODE CPUS-PER-TASK: for the following run and run_together
  lm_tasks=$(($1 * $2)) lm_nodes=$1
  lm_size=(--nodes="$1" --ntasks="$lm_tasks" --ntasks-per-node="$2" --cpus-per-task="$3")
  export OMP_NUM_THREADS=$3 MKL_NUM_THREADS=$3
}

# The agents of torchrun and accelerate ignore the signals that SLURM sends to every process: the ranks receive them
# directly and can save until SLURM's SIGKILL. (Agents would send them again, and kill the ranks after 30 s.)
run_torchrun() {
  lm_meet
  lm_each=$NPROC_PER_NODE lm_run together "$((SLURM_NNODES * NPROC_PER_NODE))" \
    --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    bash -c 'trap "" TERM USR1 USR2; exec python -m torch.distributed.run --nnodes="$SLURM_NNODES" \
      --node-rank="$SLURM_NODEID" --nproc-per-node="$NPROC_PER_NODE" --master-addr="$MASTER_ADDR" \
      --master-port="$MASTER_PORT" --signals-to-handle=SIGINT "$@"' torchrun "$@"
}

run_accelerate() {
  lm_meet
  lm_each=$NPROC_PER_NODE lm_run together "$((SLURM_NNODES * NPROC_PER_NODE))" \
    --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    bash -c 'trap "" USR1 USR2; exec accelerate launch --multi_gpu --num_machines="$SLURM_NNODES" \
      --machine_rank="$SLURM_NODEID" --num_processes="$((SLURM_NNODES * NPROC_PER_NODE))" --rdzv_backend=static \
      --main_process_ip="$MASTER_ADDR" --main_process_port="$MASTER_PORT" "$@"' accelerate "$@"
}

lm_meet() { # on the first node, at another port than earlier lives, whose processes may still run
  local nodes
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${nodes[0]} NPROC_PER_NODE
  export MASTER_PORT=$((12000 + (7 * SLURM_JOB_ID + 1009 * lm_life + 101 * lm_steps) % 16000))
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}
}

# What each task does first: check that its node has the environment, and wait for its turn (a thousand ranks that
# import Python at the same moment overload a file server).
lm_task='
rank=$((LM_FIRST + SLURM_PROCID * LM_EACH))
if [ -n "$LM_PYTHON" ] && [ "$(command -v python)" != "$LM_PYTHON" ]; then
  why="there is no $LM_PYTHON on $SLURMD_NODENAME"
  echo "error: $why"
  { printf "%s\n0 0\n%s\n\n" "$SLURMD_NODENAME" "$why" > "$LATENTMILL_LIFE/$rank.78"; } 2>/dev/null
  exit 78
fi
[ "$LM_STAGGER" = 0 ] || sleep "$((LM_STAGGER * rank / LM_WORLD))"
exec "$@"'

lm_run() { # lm_run alone|together RANKS [SRUN-OPTION...] COMMAND...
  local how=$1 ranks=$2 rc=0 options=() task=() srun watcher tee
  shift 2
  while [[ ${1:-} = --* ]]; do options+=("$1"); shift; done
  local done=$lm_state/$lm_steps.done
  export LATENTMILL_LIFE=$lm_state/$lm_life.$lm_steps
  lm_steps=$((lm_steps + 1))
  if [ -e "$done" ]; then
    lm_say "step $lm_steps was done in an earlier life"
    return 0
  fi
  rm -rf "$LATENTMILL_LIFE" 2>/dev/null || true
  lm_forget_old_lives
  if lm_writable && mkdir -p "$LATENTMILL_LIFE"; then
    options+=(--open-mode=append --output="$LOGS/%x-%j-%t.log")
  fi
  export TORCH_FR_DUMP_TEMP_FILE=$LATENTMILL_LIFE/flight- # torch appends the rank
  export LM_FIRST=$lm_first LM_WORLD=${lm_world:-$ranks} LM_EACH=$lm_each LM_PYTHON=""
  [[ -n $CONTAINER || $SRUN_ARGS = *--container* ]] || LM_PYTHON=$(command -v python || true)
  [[ $LM_PYTHON = /* ]] || LM_PYTHON="" # a shell function defined by the site
  [ -z "$LM_PYTHON" ] || lm_note python "$LM_PYTHON"
  export LM_STAGGER=${STAGGER:-$((LM_WORLD >= 6000 ? 60 : LM_WORLD / 50))}
  [[ -z $LM_PYTHON && $LM_STAGGER = 0 ]] || task=(bash -c "$lm_task" task)
  lm_module=$(lm_module_of "$@")
  lm_srun=$(mktemp "${TMPDIR:-/tmp}/latentmill-srun.XXXXXX" 2>/dev/null) || lm_srun=""
  exec 9> >(exec tee ${lm_srun:+-a "$lm_srun"} >&2)
  tee=$!
  # In the background, because bash handles a signal only after its foreground command has ended.
  # shellcheck disable=SC2086 # SRUN_ARGS and CONTAINER are several words each
  srun --export=ALL --kill-on-bad-exit=1 --wait="$WAIT" "${options[@]}" $SRUN_ARGS \
    "${task[@]}" $CONTAINER "$@" 2>&9 9>&- &
  srun=$!
  lm_watch "$srun" 9>&- &
  watcher=$!
  exec 9>&-
  wait "$srun" || rc=$?
  kill "$watcher" 2>/dev/null || true
  wait "$tee" || true
  lm_keep_folders
  { : > "$LATENTMILL_LIFE/ended"; } 2>/dev/null || true # this also makes NFS refresh the folder
  lm_judge "$how" "$rc" "$ranks"
  # Without this mark, another life repeats the step, which then finds that everything is done.
  [[ " ${lm_code[*]} " != *" 0 "* ]] && ! lm_is_ours "$(lm_ask)" || { : > "$done"; } 2>/dev/null || true
}

lm_module_of() { # lm_module_of COMMAND...: what `python -m` runs; empty if it is a script
  while [ $# -gt 1 ]; do
    [ "$1" != -m ] || { echo "$2"; return; }
    shift
  done
}

lm_forget_old_lives() { # removes the reports of lives before the previous one
  local life
  for life in "$lm_state"/[0-9]*.[0-9]*; do
    life=${life##*/}
    [[ ! ${life%%.*} =~ ^[0-9]+$ ]] || [ "${life%%.*}" -ge "$((lm_life - 1))" ] || rm -rf "${lm_state:?}/$life" || true
  done
}

# ---- how it ended

lm_judge() { # lm_judge alone|together RC RANKS: return if the work is done, otherwise end the script
  local how=$1 rc=$2 story codes
  lm_read "$3"
  codes=" ${lm_code[*]} "
  [[ $rc != 0 || $codes = *\ [1-9]* ]] || lm_unheard "$how" "$codes" || return 0
  story="srun ended with code $rc; $(lm_story "$3")"
  [ "$rc" != 0 ] || rc=1
  for code in $codes; do # srun returns the highest, which is rarely that of the rank that failed first
    [[ ! $code =~ ^[0-9]+$ || $code =~ ^(0|75|76)$ ]] || rc=$code
  done
  if [[ $how = alone && $codes = *" 0 "* ]]; then # a rank finishes only after the whole work is done
    lm_say "done, though $story"
    return 0
  fi
  [[ $codes != *" 2 "* ]] || rc=2
  story+=$(lm_first_error)
  if [[ $rc =~ ^(2|126|127)$ ]]; then
    lm_give_up "$rc" "$story. Not started again: a setting is wrong or something is missing"
  fi
  lm_find_bad_nodes "$how" "$3"
  if [ "${#lm_bad[@]}" = 0 ] && [[ -n $lm_sick || ( $codes = *" 74 "* && $(lm_fruitless) != 0 ) ]]; then
    lm_give_up "$rc" "$story. Not started again: other nodes would do no better. Fix it; the same command resumes"
  fi
  lm_again "$rc" "$story"
}

# srun returns 0 if SLURM has given up the node of this script, although its ranks may still run.
lm_unheard() { # lm_unheard alone|together CODES: whether some ranks started but never reported how they ended
  compgen -G "$LATENTMILL_LIFE/*.alive" > /dev/null && [[ $1 = together || $2 != *" 0 "* ]]
}

declare -A lm_code=() lm_node=() lm_pace=() lm_why=() # for each rank of this life
lm_work=""                                            # the folder that the ranks write to

lm_read() { # lm_read RANKS: reads the ranks' reports, or what srun reported of them
  local file name rank node pace why work
  lm_code=() lm_node=() lm_pace=() lm_why=()
  lm_place "$1"
  lm_ask_srun
  for file in "$LATENTMILL_LIFE"/[0-9]*.[0-9]*; do
    [ -e "$file" ] || continue
    name=${file##*/}
    rank=${name%.*}
    { read -r node; read -r pace; read -r why; read -r work; } < "$file" 2>/dev/null || true
    lm_code[$rank]=${name##*.}
    [ -z "${node:-}" ] || lm_node[$rank]=$node
    lm_pace[$rank]=${pace:-0 0} lm_why[$rank]=${why:-}
    lm_work=${work:-$lm_work}
  done
}

lm_place() { # lm_place RANKS: the node of each rank, by SLURM's default distribution of tasks
  local nodes counts=() part rank=$lm_first node task
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null)
  part=${SLURM_TASKS_PER_NODE:-1}
  for part in ${part//,/ }; do # 2(x3),1
    [[ $part =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]] || continue
    for ((node = 0; node < ${BASH_REMATCH[3]:-1}; node++)); do counts+=("${BASH_REMATCH[1]}"); done
  done
  for node in "${!nodes[@]}"; do
    part=${counts[$node]:-1}
    [ -z "${lm_nodes:-}" ] || part=$((node < lm_nodes ? $1 / lm_nodes : 0)) # step_size
    [ "$LM_EACH" = 1 ] || part=$LM_EACH
    for ((task = 0; task < part; task++)); do
      lm_node[$rank]=${nodes[$node]}
      rank=$((rank + 1))
    done
  done
}

# srun names tasks that failed: "srun: error: node1: tasks 0-1,3: Exited with exit code 78". A node that does not see
# the logs folder can report in no other way.
lm_ask_srun() {
  local line tasks span task
  [ "$LM_EACH" = 1 ] || return 0 # one agent for several ranks
  [ -n "$lm_srun" ] || return 0 # its messages could not be stored
  while read -r line; do
    [[ $line =~ ^srun:\ error:\ .*:\ tasks?\ ([0-9,-]+):\ Exited\ with\ exit\ code\ ([0-9]+)$ ]] || continue
    tasks=${BASH_REMATCH[1]}
    for span in ${tasks//,/ }; do
      for ((task = ${span%-*}; task <= ${span#*-}; task++)); do
        lm_code[$((lm_first + task))]=${BASH_REMATCH[2]}
      done
    done
  done < "$lm_srun"
}

lm_story() { # lm_story RANKS: how they ended
  local rank words=() failed="" culprits="" hung="" silent="" missing="" refused="" stopped=0 name
  for ((rank = lm_first; rank < lm_first + $1; rank++)); do
    case ${lm_code[$rank]:-} in
      0) ;;
      75 | 76) stopped=$((stopped + 1)) ;;
      74) refused+=" $rank" ;;
      77) hung+=" $rank" ;;
      78) missing+=" $rank" ;;
      "") silent+=" $rank" ;;
      *) failed+=" $rank(${lm_code[$rank]})" culprits+=" $rank" ;;
    esac
  done
  [ -z "$failed" ] || words+=("failed (with code):$failed on$(lm_nodes_of "$culprits")")
  [ -z "$missing" ] || words+=("without their environment:$missing on$(lm_nodes_of "$missing")")
  [ -z "$refused" ] || words+=("refused by the file system:$refused on$(lm_nodes_of "$refused")")
  [ -z "$hung" ] || words+=("hung:$hung on$(lm_nodes_of "$hung")")
  [ -z "$silent" ] || words+=("killed, lost or frozen:$silent on$(lm_nodes_of "$silent")")
  [ "$stopped" = 0 ] || words+=("stopped at a safe boundary: $stopped of $1")
  [ "${#words[@]}" -gt 0 ] || words=("all finished")
  printf -v name '%s; ' "${words[@]}"
  name=${name%; }
  echo "ranks ${name:0:400}"
}

lm_nodes_of() { # lm_nodes_of RANKS: their nodes, each preceded by a blank
  local rank seen=" "
  for rank in $1; do
    [[ $seen = *" ${lm_node[$rank]:-?} "* ]] || seen+="${lm_node[$rank]:-?} "
  done
  seen=${seen% }
  echo "${seen:0:200}"
}

lm_first_error() { # ". rank 3: error: ...", of the lowest rank whose report or log has a reason
  local rank why looks=5
  for rank in $(printf '%s\n' "${!lm_code[@]}" | sort -n); do
    [[ ! ${lm_code[$rank]} =~ ^(0|75|76)$ ]] || continue
    why=${lm_why[$rank]:-}
    if [ -z "$why" ] && [ "$looks" -gt 0 ]; then
      looks=$((looks - 1))
      why=$(tail -n 50 "$lm_logs-$((rank - lm_first)).log" 2>/dev/null |
        grep -E '^[A-Za-z_.]*[Ee]rror: ' | tail -n 1 || true)
    fi
    [ -z "$why" ] || { echo ". Rank $rank: ${why:0:400}"; return; }
  done
}

lm_again() { # lm_again RC WHY: requeue the job unless it makes no progress; ends the script
  local rc=$1 why=$2 state try fruitless
  trap '' TERM
  fruitless=$(lm_fruitless)
  if [ "$fruitless" -ge "$LIVES" ]; then
    lm_give_up "$rc" "$why. Giving up: nothing got done in $fruitless lives in a row (LIVES=$LIVES)"
  fi
  lm_note fruitless "$fruitless"
  lm_note node "$(lm_only_node)"
  for try in {1..30}; do # the controller may be unavailable for a while
    if state=$(lm_ask); then
      # SIGNALING is RUNNING while SLURM is still sending the signal, from which ranks may already have ended
      if [[ -z $lm_ending && ! $state =~ JobState=(RUNNING|SIGNALING)" " ]] || ! lm_is_ours "$state"; then
        lm_end "$rc" "$why. SLURM has ended this life of the job itself"
      fi
      if scontrol requeue "$lm_id"; then
        lm_leave_out_bad_nodes
        lm_end "$rc" "$why. Requeued: it begins again when SLURM finds room, usually not before two minutes"
      fi
    fi
    [ "$try" = 30 ] || sleep 10
  done
  lm_give_up "$rc" "$why. It could not be requeued: the same command, or sbatch, resumes where it stopped"
}

lm_ask() { scontrol show job --oneliner "$lm_id" 2>/dev/null; }

# A node that SLURM has lost may still run this script while the job already runs again elsewhere.
lm_is_ours() { [[ $1 = *" Restarts=$lm_life "* ]]; } # lm_is_ours WHAT-SLURM-SAYS

lm_fruitless() { # number of lives in a row, including this one, that ended without progress
  local before
  before=$(lm_noted fruitless)
  if compgen -G "$lm_state/$lm_life.*/saved" > /dev/null; then
    echo 0
  elif [[ " ${lm_code[*]} " = *" 78 "* && ${#lm_bad[@]} -gt 0 ]]; then
    echo "${before:-0}" # a node without the environment does not count; BAD_NODES limits how often
  else
    echo "$((${before:-$lm_life} + 1))" # if nothing could be stored, all lives count
  fi
}

# ---- the end

lm_end() { # lm_end CODE WHY: end the script, with WHY as its last line
  lm_last=said
  lm_say "$2"
  exit "$1"
}

lm_give_up() { # lm_give_up CODE WHY: the same, for good
  lm_notify failed "$2"
  lm_end "$1" "$2"
}

lm_notify() { # lm_notify finished|failed|cancelled WHY
  [ -n "$NOTIFY" ] || return 0
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then # only one task of an array notifies
    case $1 in
      finished) [ "$(squeue --noheader --jobs="$SLURM_ARRAY_JOB_ID" 2>/dev/null | wc -l)" -le 1 ] || return 0 ;;
      *) mkdir "$LOGS/.$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID.$1" 2>/dev/null || return 0 ;;
    esac
  fi
  NOTIFY=$NOTIFY timeout 60 python -m launch.notify event="$1" job="$lm_id" name="$SLURM_JOB_NAME" \
    work="${LATENTMILL_WORK:-$lm_work}" reason="$2" || true
}

trap lm_exited EXIT
lm_exited() {
  local rc=$?
  [ "$BASHPID" = "$$" ] || return 0 # a child that received a signal before it had reset our traps
  [ -z "${lm_srun:-}" ] || rm -f "$lm_srun" 2>/dev/null || true
  [ -z "$lm_last" ] || return 0
  if [ "$rc" = 0 ]; then
    lm_notify finished "done in $(lm_duration), life $lm_life"
    lm_say "finished; this life took $(lm_duration)"
  else
    lm_notify failed "the job script ended with code $rc"
    lm_say "the job script ended with code $rc: see above"
  fi
}
lm_duration() { printf '%d:%02d:%02d' "$((SECONDS / 3600))" "$((SECONDS / 60 % 60))" "$((SECONDS % 60))"; }

# While a job ends, its state is COMPLETING. SLURM's line in the output says what ended it, except for scancel.
lm_cancelled() {
  [ -f "/proc/$$/fd/2" ] && tail -n 10 "/proc/$$/fd/2" | grep -q '\*\*\* JOB .* CANCELLED AT [^ ]* \*\*\*'
}

# Whatever ends this job (scancel, a preemption, a failed node, a requeue) also decides whether it runs again; a requeue
# here would undo a scancel. Only a job at its time limit whose ranks did not stop in time has to be requeued here.
trap lm_terminated TERM
lm_terminated() {
  local state
  [ "$BASHPID" = "$$" ] || exit 143
  trap '' TERM
  lm_ending=1
  state=$(lm_ask || true)
  if [[ -n ${LATENTMILL_LIFE:-} && $state = *" Reason=TimeLimit "* ]]; then
    { : > "$LATENTMILL_LIFE/ended"; } 2>/dev/null || true
    lm_again 143 "the time limit came before the ranks had stopped"
  fi
  if [[ $state = *" JobState=CANCELLED"* ]] || lm_cancelled; then
    lm_notify cancelled "cancelled (scancel)"
    lm_end 143 "cancelled: it does not begin again by itself. The same command resumes where it stopped"
  fi
  state=${state#* JobState=}
  lm_end 143 "SLURM ends this life of the job (${state%% *}): if it is in the queue again, it resumes where it stopped"
}

# A rank whose process is frozen (stopped, or stuck in C or the kernel) cannot report it; instead, its file <rank>.alive
# becomes old by the file server's clock (the clocks of nodes may differ).
lm_frozen() {
  local now seconds
  { : > "$LATENTMILL_LIFE/now"; } 2>/dev/null || return 0
  now=$(stat -c %.Y "$LATENTMILL_LIFE/now")
  seconds=$(cat "$LATENTMILL_LIFE"/*.alive 2>/dev/null | awk 'NR == 1 { print $3 }')
  [ -n "$seconds" ] || return 0
  find "$LATENTMILL_LIFE" -name '*.alive' -printf '%T@ %f\n' |
    awk -v now="$now" -v limit="$seconds" '$1 + limit < now { sub(/\.alive$/, "", $2); printf " %s", $2 }'
}

lm_watch() { # lm_watch PID-OF-SRUN
  local frozen before="" step
  trap - EXIT TERM
  set +e # continue to check even if a command fails once
  while sleep "$LOOK"; do
    lm_keep_folders
    frozen=$(lm_frozen)
    # twice, because after a suspension all ranks look frozen for a moment
    if [ -n "$frozen" ] && [ "$frozen" = "$before" ] && lm_is_ours "$(lm_ask)"; then
      echo "$frozen " > "$LATENTMILL_LIFE/frozen"
      lm_say "no life from ranks$frozen: ending this life. All ranks write where they are into their logs"
      step=$(cat "$LATENTMILL_LIFE"/*.alive | awk 'NR == 1 { print $1 }')
      scancel --signal=USR1 "$step"
      sleep 2
      scancel --signal=TERM "$step"
      sleep "$LOOK"
      scancel --signal=KILL "$step"
      sleep "$LOOK"
      kill -KILL "$1" # srun may wait for tasks that no longer answer
      return
    fi
    before=$frozen
  done
}

lm_say "$SLURM_NTASKS tasks on $SLURM_JOB_NODELIST; their logs: $lm_logs-<task>.log"
lm_python=$(lm_noted python) # the Python of earlier lives: that of this node may lack packages
[[ -z $lm_python || -x $lm_python ]] ||
  LATENTMILL_BROKEN="there is no $lm_python, which earlier lives used, on $(hostname)"
if [ -n "${LATENTMILL_BROKEN:-}" ]; then # set by slurm/env.sh on this node
  lm_code=([$lm_first]=78) lm_node=([$lm_first]=${SLURMD_NODENAME:-$(hostname)})
  lm_bad=("${lm_node[$lm_first]}")
  lm_keep_what_may_be_left_out
  [ "${#lm_bad[@]}" -gt 0 ] || lm_give_up 78 "$LATENTMILL_BROKEN. Not started again: other nodes would do no better"
  lm_again 78 "$LATENTMILL_BROKEN"
fi
