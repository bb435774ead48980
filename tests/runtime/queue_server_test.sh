#!/usr/bin/env bash
# The queue-fed example: answers what it is asked, refuses what it must, goes on after a bad line.
#   queue_server_test.sh PROGRAM MPIEXEC MODEL_DIR
set -euo pipefail
output=$("$2" --timeout 50 -np 2 "$1" "$3" <<'END'
ask 1 20 Once upon a time
ask 1 20 the same id
ask 2 100000 Lily
what is this
cancel 77
ask 3 10 Tom and his dog
metrics
END
)
expect() { grep -qF -- "$1" <<<"$output" || { echo "missing: $1"; echo "$output"; exit 1; }; }
expect "answer 1 (length)"
expect "answer 3 (length)"
expect "refused 1: ALREADY_EXISTS"
expect "refused 77: NOT_FOUND"
expect "refused 0: INVALID_ARGUMENT: ask ID MAX_TOKENS PROMPT"
expect "# TYPE trireme_requests_total counter"
