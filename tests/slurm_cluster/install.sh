#!/usr/bin/env bash
# Debian's SLURM, real captioned images and Fashion-MNIST, for the tests: installed where root and apt-get allow it.
# Never fails: without them the tests that need them are skipped (with REQUIRE_SLURM=1 they fail instead).
set -uo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

missing=()
need() { # need PACKAGE COMMAND-OR-PATH...
  local package=$1 thing
  shift
  for thing in "$@"; do
    if [ ! -e "$thing" ] && ! command -v "$thing" >/dev/null; then
      missing+=("$package")
      return
    fi
  done
}
need slurmctld slurmctld
need slurmd slurmd
need slurm-client srun sbatch squeue scontrol
need munge munged
need iproute2 ip
need nftables nft
need tuxpaint-stamps-default /usr/share/tuxpaint/stamps
need dataset-fashion-mnist /usr/share/datasets/fashion-mnist

[ "${#missing[@]}" -gt 0 ] || exit 0
skip() { echo "not installed: ${missing[*]} ($1); tests that need them will be skipped" >&2; exit 0; }
command -v apt-get >/dev/null || skip "this system has no apt-get"
[ "$(id -u)" = 0 ] || skip "only root can install them: sudo apt-get install ${missing[*]}"

echo "installing ${missing[*]}" >&2
install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" </dev/null >&2; }
# the package lists may be missing or out of date: a failed first try is no news
install 2>/dev/null || { apt-get update -q </dev/null >&2 && install; } || skip "apt-get failed"
