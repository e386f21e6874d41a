#!/bin/sh
# tools/quietly.sh WHAT COMMAND...: prints WHAT, and the command's output only if it fails or warns.
printf '%s\n' "$1"
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
"$@" >"$log" 2>&1 || status=$?
if [ "$status" -ne 0 ]; then
  cat "$log"
  printf 'failed with exit status %s: %s\n' "$status" "$*"
elif grep -q -e 'warning:' -e 'CMake Warning' "$log"; then
  cat "$log"
fi
exit "$status"
