# What every container needs: the checkout, the logs (where ranks report how they ended), the data and the GPUs.
# Sourced by job.sh and launch/doctor.py; completes CONTAINER and SRUN_ARGS, which job.sh describes.
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
  # enroot exposes the driver and the devices to a container only if these are set
  [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || export NVIDIA_VISIBLE_DEVICES=${NVIDIA_VISIBLE_DEVICES:-all} \
    NVIDIA_DRIVER_CAPABILITIES=${NVIDIA_DRIVER_CAPABILITIES:-compute,utility}
fi
