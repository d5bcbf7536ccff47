#!/usr/bin/env bash
# Submit the stages of a dataset as a chain of jobs, each of which starts when the previous one has succeeded.
# It needs only sbatch. Run it on a login node, from the checkout:
#
#   DATASET=shapes DATA_DIR=/data slurm/pipeline.sh                     # download filter shard precompute train
#   DATASET=shapes DATA_DIR=/data slurm/pipeline.sh shard precompute
#   FILTER_OPTIONS="--nodes=4 --time=8:00:00" DATASET=shapes DATA_DIR=/data slurm/pipeline.sh
#
# It can be run again at any time: a stage whose job is pending or running is not submitted twice, and neither is a
# finished one (if Python is available here; otherwise its job ends at once). Options for all jobs are given as usual
# for sbatch: SBATCH_ACCOUNT=... SBATCH_PARTITION=... slurm/pipeline.sh
set -euo pipefail

# ---- settings, besides those of the scripts (slurm/<stage>.sbatch), which are passed on
export DATASET=${DATASET:?a name in pipeline/conf/dataset, or your own YAML}
export DATA_DIR=${DATA_DIR:?root of everything}
if [ -n "${BATCH_SIZE:-}" ]; then
  echo "BATCH_SIZE=$BATCH_SIZE: of which stage? Set PRECOMPUTE_BATCH_SIZE and TRAIN_BATCH_SIZE" >&2
  exit 2
fi
INPUT=${INPUT:-}                              # only for the first stage: the others read the output of the previous one
DOWNLOAD_OPTIONS=${DOWNLOAD_OPTIONS:-}        # options of sbatch for a single stage
FILTER_OPTIONS=${FILTER_OPTIONS:-}
SHARD_OPTIONS=${SHARD_OPTIONS:-}
PRECOMPUTE_OPTIONS=${PRECOMPUTE_OPTIONS:-}
TRAIN_OPTIONS=${TRAIN_OPTIONS:-}

# ---- the jobs
unset OUTPUT # each stage has its own output folder
stages=("$@")
[ $# -gt 0 ] || stages=(download filter shard precompute train)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# inside a job: do not pass on what that job was allocated
if [ -n "${SLURM_JOB_ID:-}" ]; then
  for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done
fi

try() { # try COMMAND...: retry for some minutes while SLURM's controller does not answer
  local said pause
  for pause in 2 4 8 15 30 60 60 0; do
    if said=$("$@" 2>&1); then
      echo "$said"
      return 0
    fi
    [[ $pause != 0 && ${said,,} =~ (unable to contact|timed out|connection refused|temporarily un) ]] || break
    echo "SLURM does not answer: trying again in $pause s" >&2
    sleep "$pause"
  done
  echo "$said" >&2
  return 1
}

# launch/status.py recognises the job by its comment
place=$(realpath -m "$DATA_DIR")/$(basename "$DATASET" .yaml)/${SPLIT:-train}
place=${place//[\'\"\\ ]/_}
before=""
for stage in "${stages[@]}"; do
  [ -f "slurm/$stage.sbatch" ] || { echo "no stage '$stage': slurm/$stage.sbatch is not there" >&2; exit 2; }
  name=$(basename "$DATASET" .yaml)-$stage
  # by the folder in its comment: other data, splits and settings with this name are different work
  id=$(try squeue --noheader --me --states=PENDING,RUNNING,SUSPENDED --format='%F %k' |
    awk -v place="$place/$stage*" '$2 == place && !found++ { print $1 }')
  if [ -n "$id" ]; then
    echo "$stage: job $id, submitted before"
  elif INPUT=$INPUT LATENTMILL_CHECK=1 SLURM_SUBMIT_DIR=$PWD bash "slurm/$stage.sbatch" > /dev/null 2>&1; then
    echo "$stage: finished already"
    INPUT=""
    continue
  else
    options=${stage^^}_OPTIONS
    # The dependency only saves time: each stage checks that its input is finished.
    # shellcheck disable=SC2086 # options are several words
    id=$(INPUT=$INPUT try sbatch --parsable --job-name="$name" --comment="$place/$stage*" \
      ${before:+--dependency=afterok:$before} --kill-on-invalid-dep=yes ${!options} "slurm/$stage.sbatch")
    id=${id##*$'\n'} # after any warnings
    id=${id%%;*}
    echo "$stage: job $id"
  fi
  before=$id
  INPUT=""
done
echo "watch: python launch/status.py $DATA_DIR"
