# What every container needs, whatever runs in it: the checkout, the logs (where ranks say how they ended), the data,
# the GPUs. job.sh and launch/doctor.py source this; it completes CONTAINER and SRUN_ARGS (job.sh says what they are).
# shellcheck shell=bash

: "${CONTAINER:=}" "${SRUN_ARGS:=}" "${BINDS:=}" "${LOGS:=}"
lm_binds=$LATENTMILL_HOME${LOGS:+,$LOGS}${BINDS:+,$BINDS}
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
