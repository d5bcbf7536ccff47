# What each task of launch/doctor.py's job runs first. It is passed as the text of `bash -c`, so that a node without a
# checkout, an environment or Python can still report that. pipeline/doctor/finding.py reads the findings, one per line.
#
# Environment: LATENTMILL_HOME, DOCTOR_SETUP (shell lines), DOCTOR_LIMIT (seconds). Arguments: those of the check.
# shellcheck shell=bash disable=SC1091,SC2086

say() { # say CHECK STATE TEXT ADVICE
  local word words=()
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    words+=("${word//[[:cntrl:]]/ }")
  done
  printf '\n@latentmill-doctor {"check": "%s", "state": "%s", "text": "%s", "advice": "%s", ' "${words[@]}"
  printf '"node": "%s", "rank": %d}\n' "${SLURMD_NODENAME:-$HOSTNAME}" "${SLURM_PROCID:-0}"
}

end() { # end TEXT ADVICE
  say environment fail "$1" "$2"
  say end ok "as far as it goes"
  exit 0
}

say start ok "" ""
[ -r "$LATENTMILL_HOME/slurm/env.sh" ] || end "the checkout $LATENTMILL_HOME cannot be read on this node" \
  "put it on a file system that all nodes see, or leave this node out (exclude=)"
said=$( (source "$LATENTMILL_HOME/slurm/env.sh") 2>&1) || end "slurm/env.sh fails: ${said##*$'\n'}" \
  "make setup, on a file system that all nodes see; or name the environment in slurm/env.sh"
source "$LATENTMILL_HOME/slurm/env.sh"
[ -z "${LATENTMILL_BROKEN:-}" ] || end "$LATENTMILL_BROKEN" \
  "make setup, on a file system that all nodes see; or leave this node out (exclude=)"
said=$( (eval "${DOCTOR_SETUP:-}") 2>&1) || end "setup= fails: ${said##*$'\n'}" "correct these lines: $DOCTOR_SETUP"
eval "${DOCTOR_SETUP:-}"
said=$($CONTAINER python -c 'import sys; sys.exit(sys.version_info < (3, 11) and sys.version.split()[0])' 2>&1) ||
  end "python is not Python 3.11 or later: ${said##*$'\n'} ($(command -v python))" "make setup; or slurm/env.sh"
said=$($CONTAINER python -c 'import pipeline.doctor.__main__' 2>&1) ||
  end "Python cannot import the pipeline: ${said##*$'\n'} ($(command -v python))" "make setup, or another image"
timeout --kill-after=10 "${DOCTOR_LIMIT:-600}" $CONTAINER python -u -m pipeline.doctor "$@" 2>&1
code=$?
case $code in
  0) ;;
  124 | 137) say environment fail "no end within ${DOCTOR_LIMIT:-600} s" "its last lines say where it hangs" ;;
  *) say environment fail "the check ended with code $code" "" ;;
esac
exit 0
