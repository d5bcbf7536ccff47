#!/usr/bin/env bash
# node.sh ROOT start|stop|crash|cut|heal|orphan|revive NODE, node.sh ROOT hide|mount|readonly|show NODE PATH,
# node.sh ROOT open NODE FOLDER PATH
#
#   start   start the node's daemon          stop   end it politely
#   crash   kill -9 it. With NETNS=1 every process of the node dies at once, as when the power fails;
#           with NETNS=0 its tasks live on as orphans
#   cut     take the node off the network; its tasks live on (NETNS=1 only)       heal   put it back
#   hide    the node sees an empty folder at PATH, as when a file system is not mounted (NETNS=1 only)
#   mount   the node has PATH as a file system of its own, which can turn read-only under those who use it (NETNS=1 only)
#   readonly  the node cannot write below PATH any more. If it was mounted before, nobody on it can, unless a file is
#           open for writing just then, which is an error; else those who begin later (NETNS=1 only)
#   open    of a FOLDER that only its owner can enter, the node sees nothing but PATH, which all users can read then
#   show    undo hide, mount, readonly or open
#   orphan  kill -9 the daemon alone; its tasks live on (NETNS=1 only)            revive start it again
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
ROOT=$1 ACTION=$2 NODE=$3
source "$ROOT/cluster.sh"
export SLURM_CONF="$ROOT/etc/slurm.conf"
PIDFILE=$ROOT/pids/slurmd-$NODE.pid

start_in_namespaces() {
  # nsenter, as `ip netns exec` would mount /sys again without cgroups, and slurmd would not start. bash stays process 1
  # of the node, also without slurmd, and reaps the orphaned slurmstepds: slurmd does not, and zombies drain a node.
  # stop.sh and `crash` kill unshare; --kill-child takes the whole process table of the node with it
  setsid nsenter --net="/run/netns/$BRIDGE-$NODE" unshare --uts --pid --mount --fork --kill-child --mount-proc bash -c \
    "hostname $NODE; mount --bind '$ROOT/etc/hosts' /etc/hosts; slurmd -D & wait; while :; do sleep 3600 & wait; done" \
    >> "$ROOT/log/$NODE.out" 2>&1 < /dev/null &
  echo $! > "$PIDFILE"
}

start_as_daemon() {
  setsid slurmd -D -N "$NODE" >> "$ROOT/log/$NODE.out" 2>&1 < /dev/null &
  echo $! > "$PIDFILE"
}

first_process() { pgrep -P "$(cat "$PIDFILE")"; } # of the node's own process table

on_node() { nsenter --target "$(first_process)" --pid --mount "$@"; }

case $ACTION in
  start)
    mkdir -p "$ROOT/spool/$NODE"
    if [ "$NETNS" = 1 ]; then start_in_namespaces; else start_as_daemon; fi
    ;;
  stop) kill -TERM "$(cat "$PIDFILE")" ;;
  crash) kill -KILL "$(cat "$PIDFILE")" ;;
  cut) ip link set "${BRIDGE}n${NODE#node}" down ;;
  orphan) kill -KILL "$(pgrep -P "$(first_process)" -x slurmd)" ;;
  revive) setsid nsenter --target "$(first_process)" --net --uts --pid --mount slurmd ;;
  hide) on_node mount -t tmpfs -o size=1m none "$4" ;;
  mount) on_node mount --bind "$4" "$4" ;;
  readonly)
    on_node mountpoint --quiet "$4" || on_node mount --bind "$4" "$4"
    on_node mount -o remount,bind,ro "$4"
    ;;
  open)
    # shellcheck disable=SC2016 # the node's shell expands it
    on_node bash -ec 'aside=$(mktemp -d); mount --bind "$2" "$aside"; mount -t tmpfs -o mode=755 none "$1"; mkdir -p "$2"
      mount --bind "$aside" "$2"; umount "$aside"; rmdir "$aside"' open "$4" "$5"
    ;;
  show) on_node umount --lazy "$4" ;;
  heal) ip link set "${BRIDGE}n${NODE#node}" up ;;
  *) echo "node.sh: unknown action '$ACTION'" >&2; exit 2 ;;
esac
