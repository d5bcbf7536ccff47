# Finds the nodes that failed in a life of a job while others did not, and excludes them from the next. Part of job.sh.
#
# A node is bad if one of its ranks failed, hung, was killed or lost, had no environment, could not use the file system,
# or was three times slower than those on other nodes. It is excluded only if other nodes did well: an error that
# occurs everywhere is not the fault of a node. A job on a single node tries another one if the first has no
# environment, or after two lives in a row without progress. At most BAD_NODES nodes are excluded in all lives together,
# and never so many that SLURM could no longer start the job.
# shellcheck shell=bash

lm_bad=()  # nodes to exclude
lm_sick="" # nodes that were checked and cannot write, or lack the environment
: "${SLOW_AFTER:=60}" # seconds of work after which the speed of a rank is meaningful

lm_find_bad_nodes() { # lm_find_bad_nodes alone|together RANKS: sets lm_bad
  local rank node bad=" " well=" " codes=" ${lm_code[*]} " blamed
  lm_bad=() lm_sick=""
  blamed=$(lm_blamed)
  for ((rank = lm_first; rank < lm_first + $2; rank++)); do
    node=${lm_node[$rank]:-}
    [ -n "$node" ] || continue
    case ${lm_code[$rank]:-} in
      0 | 75 | 76) [[ $well = *" $node "* ]] || well+="$node " ;;
      *)
        if [[ $blamed = *" $rank "* ]]; then
          [[ $bad = *" $node "* ]] || bad+="$node "
        elif [ -s "$LATENTMILL_LIFE/frozen" ] && [ -n "${lm_code[$rank]:-}" ]; then
          well+="$node " # it only waited for the frozen ranks
        fi
        ;;
    esac
  done
  if [[ $codes = *" 74 "* || $codes = *" 78 "* ]]; then
    lm_sick=$(lm_probe "$codes")
    bad=" $lm_sick "
    well=" $(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')"
  fi
  for node in $bad; do well=${well/ $node / }; done
  [ "$1" = together ] || bad+=$(lm_slow_nodes "$bad")
  read -r -a lm_bad <<< "$bad" || true
  if [ "$SLURM_NNODES" -gt 1 ]; then
    [ -n "${well// /}" ] || lm_bad=()
  elif [[ $codes != *" 78 "* && $(lm_noted node) != "${lm_bad[0]:-}" ]]; then
    lm_bad=() # the only node: it gets a second chance
  fi
  lm_keep_what_may_be_left_out
}

# The ranks that failed first: the others were killed by srun or only waited for them.
lm_blamed() { # prints " 3 5 "
  local rank said=" " silent=" "
  if [ -s "$LATENTMILL_LIFE/frozen" ]; then
    cat "$LATENTMILL_LIFE/frozen"
    return
  fi
  for rank in "${!lm_node[@]}"; do
    case ${lm_code[$rank]:-} in
      0 | 75 | 76) ;;
      "") silent+="$rank " ;;
      *) said+="$rank " ;;
    esac
  done
  if [ "$said" != " " ]; then echo "$said"; else echo "$silent"; fi
}

# Whether the file system or the environment is broken on a single node or on all: check each.
lm_probe() { # lm_probe CODES: prints the broken ones: "node1 node2"
  local rank module=${lm_module:-pipeline}
  for rank in "${!lm_why[@]}"; do
    [[ ! ${lm_why[$rank]} =~ "No module named '"([A-Za-z0-9_.]+)"'" ]] || module=${BASH_REMATCH[1]}
  done
  # shellcheck disable=SC2016,SC2086 # expanded on the nodes; SRUN_ARGS are several words
  LM_CODES=$1 LM_WORK=${lm_work:-$PWD} LM_MODULE=$module LM_CONTAINER=$CONTAINER timeout 120 srun --export=ALL \
    --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --overlap $SRUN_ARGS bash -c '
    good=1
    if [[ $LM_CODES = *" 74 "* ]]; then
      file=$(mktemp "$LM_WORK/.probe.XXXXXX" 2>/dev/null) && head -c 65536 /dev/zero 2>/dev/null >> "$file" || good=0
      rm -f "${file:-}"
    fi
    if [[ $LM_CODES = *" 78 "* ]]; then
      [[ -z $LM_PYTHON || $(command -v python) = "$LM_PYTHON" ]] &&
        $LM_CONTAINER python -c "import importlib, sys; importlib.import_module(sys.argv[1])" "$LM_MODULE" \
          > /dev/null 2>&1 || good=0
    fi
    [ "$good" = 1 ] || echo "$SLURMD_NODENAME"' 2>/dev/null | sort -u | tr '\n' ' ' || true
}

# Steps per second of work: the mean over a node's ranks, compared with the median over the other nodes.
lm_slow_nodes() { # lm_slow_nodes KNOWN-TO-BE-BAD
  local rank
  for rank in "${!lm_pace[@]}"; do
    [[ -z ${lm_node[$rank]:-} || $1 = *" ${lm_node[$rank]} "* ]] || echo "${lm_node[$rank]} ${lm_pace[$rank]}"
  done | awk -v least="$SLOW_AFTER" '
    $3 >= least { steps[$1] += $2; seconds[$1] += $3; if (!($1 in number)) { number[$1] = ++count; name[count] = $1 } }
    END {
      for (i = 1; i <= count; i++) {
        n = 0
        for (j = 1; j <= count; j++) if (j != i) other[++n] = steps[name[j]] / seconds[name[j]]
        for (a = 2; a <= n; a++) for (b = a; b > 1 && other[b] < other[b - 1]; b--) {
          swap = other[b]; other[b] = other[b - 1]; other[b - 1] = swap
        }
        if (n && 3 * steps[name[i]] / seconds[name[i]] < other[int((n + 1) / 2)]) printf "%s ", name[i]
      }
    }'
}

lm_keep_what_may_be_left_out() { # limits lm_bad to what BAD_NODES and SLURM allow
  local node kept=() before state excluded
  before=$(lm_noted excluded)
  state=$(lm_ask || true)
  excluded=$(lm_field ExcNodeList "$state")
  for node in ${lm_bad[@]+"${lm_bad[@]}"}; do
    [[ " $before " != *" $node "* ]] || continue
    if [ "$(wc -w <<< "$before ${kept[*]-}")" -ge "$BAD_NODES" ]; then
      [ "$BAD_NODES" = 0 ] || lm_say "$node did badly too, but no more than BAD_NODES=$BAD_NODES nodes are left out"
    elif lm_enough_without "$(IFS=,; echo "${excluded:+$excluded,}${kept[*]:+${kept[*]},}$node")" "$state"; then
      kept+=("$node")
    else
      lm_say "$node did badly, but without it SLURM could not start this job: it is not left out"
    fi
  done
  lm_bad=(${kept[@]+"${kept[@]}"})
}

lm_field() { # lm_field NAME WHAT-SLURM-SAYS: empty if there is none
  [[ " $2 " =~ \ $1=([^\ ]*)\  ]] || return 0
  [[ ${BASH_REMATCH[1]} = "(null)" ]] || echo "${BASH_REMATCH[1]}"
}

lm_enough_without() { # lm_enough_without NODES WHAT-SLURM-SAYS: whether the job could run without these nodes
  local option name value options=() gpus
  for option in partition=Partition constraint=Features account=Account qos=QOS reservation=Reservation; do
    name=${option#*=}
    value=$(lm_field "$name" "$2")
    [ -z "$value" ] || options+=("--${option%%=*}=$value")
  done
  gpus=$(lm_field TresPerNode "$2")
  [ -z "$gpus" ] || options+=("--gres=${gpus#gres:}")
  env -i PATH="$PATH" HOME="${HOME:-/}" ${SLURM_CONF:+SLURM_CONF="$SLURM_CONF"} timeout 60 \
    sbatch --test-only --exclude="$1" --nodes="$SLURM_NNODES" --ntasks-per-node="$((SLURM_NTASKS / SLURM_NNODES))" \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${options[@]}" --wrap=true > /dev/null 2>&1
}

lm_only_node() { [ "$SLURM_NNODES" != 1 ] || echo "$SLURM_JOB_NODELIST"; }

# Possible only while the job is pending.
lm_leave_out_bad_nodes() {
  local try excluded nodes
  [ "${#lm_bad[@]}" -gt 0 ] || return 0
  nodes=$(IFS=,; echo "${lm_bad[*]}")
  for try in 1 2 3 4 5; do
    excluded=$(lm_field ExcNodeList "$(lm_ask || true)")
    if scontrol update JobId="$lm_id" ExcNodeList="${excluded:+$excluded,}$nodes"; then
      lm_note excluded "$(lm_noted excluded) ${lm_bad[*]}"
      lm_say "left out of the next life, as they did badly while others did well: $nodes (BAD_NODES=0: never)"
      return 0
    fi
    [ "$try" = 5 ] || sleep 1
  done
  lm_say "$nodes did badly, but SLURM does not let this job leave them out"
}
