# What the tests of the command line share: the program and a checkpoint under names without spaces, and what is expected of a
# command. To be sourced with their arguments, TRIREME MPIEXEC MODELS_DIR (which holds stories260K); end with finish.
set -u
mpiexec=$2
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
# Names without spaces, wherever the repository lies.
ln -s "$1" "$work/trireme"; trireme=$work/trireme
ln -s "$3/stories260K" "$work/stories260K"; model=$work/stories260K
passed=0 failed=0
# The mpirun of Open MPI 5 loses part or all of what ranks print, now and then on a busy machine.
loses_output=$("$mpiexec" --version 2>/dev/null | grep -o 'Open MPI) 5') || loses_output=

fail() { printf 'FAILED: %s\n' "$*"; failed=$((failed + 1)); }
# expect STATUS 'extended regex of the last stderr line' COMMAND...: also checks that stderr is a single line on failure.
expect() {
  local status=$1 pattern=$2; shift 2
  local problem; problem=$(try "$status" "$pattern" "$@")
  if [ -n "$problem" ] && [ -n "$loses_output" ]; then echo "once more: $problem"; problem=$(try "$status" "$pattern" "$@"); fi
  if [ -n "$problem" ]; then fail "$problem"; else passed=$((passed + 1)); fi
}
try() {  # prints what is wrong
  local status=$1 pattern=$2; shift 2
  timeout 60 "$@" >"$work/out" 2>"$work/err"; local got=$?
  local lines; lines=$(grep -c '^trireme:' "$work/err")
  if [ "$got" != "$status" ]; then echo "$* : exit status $got, not $status: $(head -c 400 "$work/err")"
  elif ! grep -qE -e "$pattern" "$work/err" "$work/out"; then echo "$* : no '$pattern' in: $(head -c 400 "$work/err")"
  elif [ "$status" != 0 ] && [ "$lines" != 1 ]; then echo "$* : $lines lines of our own, not one"; fi
}
# mpirun adds lines of its own when a rank fails; only ours start with "trireme:".
ranks() { printf '%s\n' "$mpiexec -np $1 $trireme"; }
finish() {
  printf '%d passed, %d failed\n' "$passed" "$failed"
  [ "$failed" = 0 ]
}
