#!/usr/bin/env bash
# Start a private multi-node SLURM on this one machine (Debian's packages, root, no systemd, no cgroups).
#
#   start.sh ROOT
#
#   ID=1         1..200: several clusters may run side by side, each with its own number (ports, network, names)
#   NETNS=1      every node has its own hostname, network and process table, so that it can be crashed whole or cut off;
#                NETNS=0: the nodes are only daemons on this host
#   ACCT=none    dbd: with a private mariadb and slurmdbd, so that sacct works (slower by 4 s, 120 MB more)
#   NNODES=4 CPUS=16 GPUS=8 MEM=16000    what each node claims to have
#
# After it: source ROOT/env.sh; sinfo. ROOT must be short (a socket path below it may have 107 characters) and is
# replaced if it exists.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PATH="$PATH:/usr/sbin:/sbin"
ROOT=${1:?usage: start.sh ROOT}
ID=${ID:-1} NNODES=${NNODES:-4} CPUS=${CPUS:-16} GPUS=${GPUS:-8} MEM=${MEM:-16000} ACCT=${ACCT:-none} NETNS=${NETNS:-1}
# below the range from which the kernel gives out ports to clients
PORT0=$((15000 + 60 * ID)) CTLPORT=$((15000 + 60 * ID)) DBDPORT=$((PORT0 + 1)) DBPORT=$((PORT0 + 2))
NET=198.18.$ID BRIDGE=lm$ID
export SLURM_CONF="$ROOT/etc/slurm.conf"

if [ -e "$ROOT/pids/slurmctld.pid" ] && kill -0 "$(cat "$ROOT/pids/slurmctld.pid")" 2>/dev/null; then
  echo "a cluster is running under $ROOT already" >&2
  exit 1
fi
rm -rf "$ROOT"
mkdir -p "$ROOT"/{etc,pids,log,state,dev,munge}
chmod 755 "$ROOT"
cat > "$ROOT/env.sh" <<EOF
export SLURM_CONF=$SLURM_CONF SLURM_TEST_ROOT=$ROOT
EOF
cat > "$ROOT/cluster.sh" <<EOF
ID=$ID NETNS=$NETNS BRIDGE=$BRIDGE NNODES=$NNODES
EOF

start_munge() { # with a key and a socket of its own
  head -c 128 /dev/urandom > "$ROOT/munge/munge.key"
  chmod 400 "$ROOT/munge/munge.key"
  munged --force --key-file="$ROOT/munge/munge.key" --socket="$ROOT/munge/munge.sock" --num-threads=10 \
    --pid-file="$ROOT/pids/munged.pid" --log-file="$ROOT/munge/munged.log" --seed-file="$ROOT/munge/munged.seed"
}

make_gpus() { # device nodes with no driver behind them: plain files are refused, and CUDA_VISIBLE_DEVICES would stay unset
  local n
  for ((n = 0; n < GPUS; n++)); do mknod "$ROOT/dev/nvidia$n" c 195 "$n"; done
}

write_config() {
  local n where address=127.0.0.1
  [ "$NETNS" = 0 ] || address=$NET.254
  sed -e "s#@ROOT@#$ROOT#g" -e "s#@HOST@#$(hostname -s)#g" -e "s#@CTLADDR@#$address#g" \
    -e "s#@CTLPORT@#$CTLPORT#g" -e "s#@DBDPORT@#$DBDPORT#g" "$here/slurm.conf" > "$SLURM_CONF"
  if [ "$ACCT" = dbd ]; then
    sed -i "s#^AccountingStorageType=.*#AccountingStorageType=accounting_storage/slurmdbd#" "$SLURM_CONF"
  else
    sed -i "/^AccountingStorage\(Host\|Port\|Pass\)=/d" "$SLURM_CONF"
  fi
  for ((n = 1; n <= NNODES; n++)); do
    where="NodeHostname=node$n NodeAddr=$NET.$n Port=$((PORT0 + 3))"
    [ "$NETNS" = 1 ] || where="NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((PORT0 + 2 + n))"
    echo "NodeName=node$n $where CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1" \
      "RealMemory=$MEM Gres=gpu:h100:$GPUS State=UNKNOWN"
  done > "$ROOT/etc/nodes.conf"
  { echo "include $ROOT/etc/nodes.conf"; cat "$here/partitions.conf"; } >> "$SLURM_CONF"
  { echo "AutoDetect=off"; echo "NodeName=node[1-$NNODES] Name=gpu Type=h100 File=$ROOT/dev/nvidia[0-$((GPUS - 1))]"; } \
    > "$ROOT/etc/gres.conf"
  : > "$ROOT/etc/cgroup.conf"
  printf '#!/bin/sh\necho "$@" >> "%s/log/mail"\n' "$ROOT" > "$ROOT/etc/mail" # keeps what SLURM would send
  chmod +x "$ROOT/etc/mail"
}

sql() { mariadb --no-defaults -uroot -S "$ROOT/mysql/s.sock" -e "$1"; }

start_accounting() { # mariadb listens on loopback only
  local host
  mkdir -p "$ROOT/mysql"
  chown mysql "$ROOT/mysql"
  mariadb-install-db --user=mysql --datadir="$ROOT/mysql/data" --auth-root-authentication-method=normal --skip-test-db \
    > "$ROOT/log/mysql_install.log" 2>&1
  setsid mariadbd --no-defaults --user=mysql --datadir="$ROOT/mysql/data" --socket="$ROOT/mysql/s.sock" \
    --pid-file="$ROOT/mysql/mariadb.pid" --port="$DBPORT" --bind-address=127.0.0.1 --innodb-buffer-pool-size=64M \
    --innodb-flush-log-at-trx-commit=0 --performance-schema=OFF > "$ROOT/log/mariadb.log" 2>&1 < /dev/null &
  echo $! > "$ROOT/pids/mariadb.pid"
  wait_for 150 sql 'select 1'
  sql "create database slurm_acct_db"
  for host in 127.0.0.1 localhost; do
    sql "create user slurm@'$host' identified by 'slurm'; grant all on slurm_acct_db.* to slurm@'$host'"
  done
  sed -e "s#@ROOT@#$ROOT#g" -e "s#@HOST@#$(hostname -s)#g" -e "s#@DBDPORT@#$DBDPORT#g" -e "s#@DBPORT@#$DBPORT#g" \
    "$here/slurmdbd.conf" > "$ROOT/etc/slurmdbd.conf"
  chmod 600 "$ROOT/etc/slurmdbd.conf"
  setsid slurmdbd -D > "$ROOT/log/slurmdbd.out" 2>&1 < /dev/null &
  echo $! > "$ROOT/pids/slurmdbd.pid"
  wait_for 50 timeout 2 sacctmgr -n list cluster # without a server it would block for minutes
  timeout 10 sacctmgr -i add cluster latentmill > /dev/null
}

make_network() { # one bridge, one veth pair a node; nothing leaves the machine
  local n ns
  ip link add "$BRIDGE" type bridge
  ip addr add "$NET.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  { echo "127.0.0.1 localhost"; echo "$NET.254 $(hostname -s)"; } > "$ROOT/etc/hosts"
  for ((n = 1; n <= NNODES; n++)); do
    ns=$BRIDGE-node$n
    echo "$NET.$n node$n" >> "$ROOT/etc/hosts"
    ip netns add "$ns"
    ip link add "${BRIDGE}n$n" type veth peer name eth0 netns "$ns"
    ip link set "${BRIDGE}n$n" master "$BRIDGE" up
    ip -n "$ns" addr add "$NET.$n/24" dev eth0
    ip -n "$ns" link set eth0 up
    ip -n "$ns" link set lo up
  done
}

wait_for() { # wait_for TENTHS COMMAND...
  local i tenths=$1
  shift
  for ((i = 0; i < tenths; i++)); do
    "$@" > /dev/null 2>&1 && return 0
    sleep .1
  done
  echo "no success in $((tenths / 10)) s: $*" >&2
  return 1
}

all_idle() { [ "$(sinfo -h -N -p main -t idle -o %N | wc -l)" -ge "$NNODES" ]; }

start_munge
make_gpus
write_config
[ "$ACCT" = none ] || start_accounting
[ "$NETNS" = 0 ] || make_network
# each daemon leads a session of its own and its process id is kept, so that stop.sh ends these and nothing else
setsid slurmctld -D -i > "$ROOT/log/slurmctld.out" 2>&1 < /dev/null &
echo $! > "$ROOT/pids/slurmctld.pid"
for ((n = 1; n <= NNODES; n++)); do "$here/node.sh" "$ROOT" start "node$n"; done
wait_for 300 all_idle
