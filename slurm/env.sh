# The environment of every job. All scripts in this folder, and all that launch/submit.py writes, source it first.
# Adapt it to your site once, here. It must work under `set -euo pipefail` and when it is sourced twice.

# Location of the checkout. (A batch script runs from a copy in SLURM's spool folder, so only this file knows.)
LATENTMILL_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export LATENTMILL_HOME
export PYTHONPATH=$LATENTMILL_HOME${PYTHONPATH:+:$PYTHONPATH}

# ---- 1. modules of the site. Some sites' module files read unset variables, hence +u.
# set +u
# module purge
# module load python/3.11 cuda
# set -u

# ---- 2. Python: the environment that `make setup` created, or another one: LATENTMILL_VENV=/path sbatch …
# conda instead: set +u; source /path/to/conda/etc/profile.d/conda.sh; conda activate latentmill; set -u
if [ -z "${LATENTMILL_VENV:-}" ]; then
  LATENTMILL_VENV=$LATENTMILL_HOME/.venv
  latentmill_default=1
fi
LATENTMILL_BROKEN="" # what is wrong on this node; job.sh then tries another node if there is one
latentmill_contained="" # whether the container has its own Python
[[ -z ${CONTAINER:-} && ${SRUN_ARGS:-} != *--container-image* ]] || latentmill_contained=1
if [ -f "$LATENTMILL_VENV/bin/activate" ]; then
  case $- in *u*) latentmill_u=-u ;; *) latentmill_u=+u ;; esac
  set +u # activate reads variables that may be unset
  source "$LATENTMILL_VENV/bin/activate"
  set "$latentmill_u"
  unset latentmill_u
  if [[ -z $latentmill_contained && -L $LATENTMILL_VENV/bin/python && ! -x $LATENTMILL_VENV/bin/python ]]; then
    LATENTMILL_BROKEN="the Python of $LATENTMILL_VENV cannot be run by user $(id -un) on $(hostname)"
  fi
elif [ -n "$latentmill_contained" ]; then
  :
elif [ -z "${latentmill_default:-}" ]; then
  LATENTMILL_BROKEN="no Python environment at LATENTMILL_VENV=$LATENTMILL_VENV on $(hostname)"
elif ! command -v python > /dev/null; then
  LATENTMILL_BROKEN="no Python on $(hostname): neither $LATENTMILL_VENV (make setup) nor one on PATH; see slurm/env.sh"
else
  echo "there is no $LATENTMILL_VENV (make setup): using $(command -v python)" >&2
fi
unset latentmill_contained
if [ -n "$LATENTMILL_BROKEN" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "$LATENTMILL_BROKEN" >&2
  return 1
fi

# ---- 3. threads: one per rank, or as many as the CPUs requested for it. More threads than CPUs are slower than one.
# (NPROC_PER_NODE: ranks of one task, where that is a torchrun.)
latentmill_threads=$((${SLURM_CPUS_PER_TASK:-1} / ${NPROC_PER_NODE:-1}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((latentmill_threads > 0 ? latentmill_threads : 1))}
unset latentmill_threads
export MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS} OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1 # so that a log is complete up to the moment at which a node fails
# Since SLURM 22.05, srun does not inherit --cpus-per-task from the batch job.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# When a rank's log reaches this size in MB, it is renamed to <log>.1, which is overwritten, and a new log is started.
export LATENTMILL_LOG_MEGABYTES=${LATENTMILL_LOG_MEGABYTES:-64} # 0: no limit

# ---- 4. cache of downloaded models, on a shared file system. Compute nodes are often offline: fill it beforehand.
# export HF_HOME=/path/on/a/shared/filesystem
# export HF_HUB_OFFLINE=1

# ---- 5. network, if ranks on several nodes cannot reach each other. To list interfaces: ip -brief address
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_SOCKET_IFNAME=ib0
# export MASTER_PORT=29500    # normally derived from the job id

# When a collective times out, each rank writes what it was waiting for to the job's logs folder (slurm/job.sh sets the
# file names), from which `python launch/status.py <data_dir> logs=failed` finds the missing rank. torch's default for
# ending a rank whose collective failed is kept: it ends the process without aborting the communicator, which may hang.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
