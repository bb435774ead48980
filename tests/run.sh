#!/usr/bin/env bash
# Builds everything, tests included, and runs all tests: tests/run.sh [options]
#   --preset NAME   cpu (default), asan or tsan: which build of CMakePresets.json
#   --filter REGEX  only the tests whose ctest name matches
#   --werror        warnings are errors (what CI does)
#   --second-try    a test that fails runs once more, and is named at the end (what CI does: its machines are shared, and
#                   tests of what happens within seconds can meet a stall)
#   --help          this text
# Installs missing packages first when it may. At the end: what was skipped and why, and ctest's closing line. The exit
# status is 0 when every test passed.
set -euo pipefail

cd -- "$(cd -- "$(PATH=/usr/bin:/bin dirname -- "${BASH_SOURCE[0]}")" && pwd -P)/.."
# shellcheck source=launch/packages.sh
source launch/packages.sh
# shellcheck source=launch/build.sh
source launch/build.sh
# shellcheck source=launch/mpi_env.sh
source launch/mpi_env.sh
complete_environment

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' tests/run.sh >&2; }

# Prints what did not run: whole tests (ctest) and single cases (GoogleTest), each once, with the reason given.
report_skipped() {
  local log=$1
  awk '
    # A case of a multi-rank test is skipped on every rank: one line is enough.
    function report(line) { if (!seen[line]++) print "  " line }
    /^[0-9]+\/[0-9]+ Testing: / { test = $3; reason = ""; next }
    /: Skipped$/ { reading = 1; reason = ""; next }
    /\[  SKIPPED \]/ && /\([0-9]+ ms\)/ {
      sub(/.*\[  SKIPPED \] /, ""); sub(/ \([0-9]+ ms\).*/, "")
      report(test ": " $0 (reason == "" ? "" : ": " reason)); reading = 0; next
    }
    reading && NF { reason = reason == "" ? $0 : reason " " $0; next }
    /^SKIPPED: / { report(test ": " substr($0, 10)); next }
    /YOU HAVE [0-9]+ DISABLED TEST/ { report(test ": " $3 " disabled cases") }
    /^Disabled$|^Test not run|^Unable to find executable/ { report(test ": " $0) }
  ' "$log"
}

# Prints the tests that failed and then passed.
report_second_tries() {
  awk '
    match($0, /Test +#[0-9]+: [^ ]+/) {
      name = substr($0, RSTART, RLENGTH); sub(/.*: /, "", name)
      if (/\*\*\*/ && !/\*\*\*Skipped/) failed[name] = 1
      else if (/ Passed / && failed[name]) print "  " name
    }
  ' "$1"
}

preset=cpu
filter=()
repeat=()
definitions=()
while (($#)); do
  case $1 in
    --preset)
      preset=${2-}
      [[ $preset =~ ^(cpu|asan|tsan)$ ]] || { say "--preset is cpu, asan or tsan, not '$preset'."; exit 2; }
      shift
      ;;
    --filter)
      [[ -n "${2-}" ]] || { say "--filter needs a regular expression."; exit 2; }
      filter=(-R "$2")
      shift
      ;;
    --werror) definitions+=(-DTRIREME_WARNINGS_AS_ERRORS=ON) ;;
    --second-try) repeat=(--repeat until-pass:2) ;;
    --help | -h) usage; exit 0 ;;
    *) say "Unknown option $1."; usage; exit 2 ;;
  esac
  shift
done

install_packages "${TRIREME_PACKAGES[@]}" "${TRIREME_TEST_PACKAGES[@]}" || exit 1
say "Building preset $preset in build/$preset with $(build_jobs) jobs."
build_start=$SECONDS
build_preset "$preset" -DTRIREME_BUILD_TESTS=ON "${definitions[@]}" || die "The build failed; see above."
say "Built in $((SECONDS - build_start)) s."

single_node_mpi_environment
folder="build/$preset/Testing/Temporary"
mkdir -p "$folder"
output="$folder/run.txt"
status=0
# A multi-rank test claims a core per rank; where there are fewer it runs alone.
# Jobs of Open MPI 4 make $TMPDIR/ompi.HOST.UID, and the last one to end removes it; one that begins just then fails. What is
# in it keeps it.
host=$(uname -n)
session=${TMPDIR:-/tmp}/ompi.${host%%.*}.$(id -u)
(umask 077 && mkdir -p "$session/kept")
trap 'rmdir "$session/kept" "$session" 2>/dev/null || :' EXIT
ctest --test-dir "build/$preset" --output-on-failure --no-tests=error --parallel "$(nproc)" "${filter[@]}" \
  "${repeat[@]}" </dev/null |
  tee "$output" || status=$?

log="$folder/LastTest.log"
skipped=$(report_skipped "$log")
if [[ -n "$skipped" ]]; then
  printf '\nSkipped:\n%s\n\n' "$skipped"
else
  printf '\nNothing was skipped.\n\n'
fi
second_tries=$(report_second_tries "$output")
[[ -z "$second_tries" ]] || printf 'Failed once, and passed when run again:\n%s\n\n' "$second_tries"
grep -E '^[0-9]+% tests passed' "$output" || true
exit "$status"
