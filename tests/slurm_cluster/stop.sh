#!/usr/bin/env bash
# stop.sh ROOT: stop the cluster that start.sh started there, by recorded process ids only, and take its network down.
# It may be called twice, and on what a killed test run left behind.
set -uo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
ROOT=${1:?usage: stop.sh ROOT}
[ -e "$ROOT/cluster.sh" ] || exit 0
source "$ROOT/cluster.sh"
export SLURM_CONF="$ROOT/etc/slurm.conf"

is_ours() { # after a crash and a reboot the number may belong to a stranger
  [ -r "/proc/$1/cmdline" ] && tr '\0' ' ' < "/proc/$1/cmdline" | grep -qE 'slurm|munged|mariadbd|unshare'
}

stop() { # stop PIDFILE TENTHS: TERM, then KILL when it has not ended in time
  local pid i
  [ -s "$1" ] || return 0
  pid=$(cat "$1")
  is_ours "$pid" || return 0
  kill -TERM "$pid" 2>/dev/null || return 0
  for ((i = 0; i < $2; i++)); do
    is_ours "$pid" || return 0
    sleep .1
  done
  kill -KILL "$pid" 2>/dev/null
}

timeout 10 scancel -u "$(id -un)" 2>/dev/null
sleep 1
for file in "$ROOT"/pids/slurmd-node*.pid; do
  [ "$file" != "${file%.own.pid}" ] || stop "$file" 20 &
done
wait
for daemon in slurmctld slurmdbd mariadb munged; do stop "$ROOT/pids/$daemon.pid" 100; done
[ "$NETNS" = 1 ] || exit 0
quietly() { "$@" 2> /dev/null; }
for ((n = 1; n <= NNODES; n++)); do
  quietly ip link del "${BRIDGE}n$n" # the kernel takes a namespace's devices down only later
  quietly ip netns del "$BRIDGE-node$n"
done
quietly ip link del "$BRIDGE"
exit 0
