#!/usr/bin/env bash
# A story by four ranks on two nodes of a Slurm cluster. Options of sbatch (--partition, --account, ...) are passed on.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

command -v sbatch >/dev/null || { echo "submit.sh: there is no sbatch here: run it on a login node of a Slurm cluster" >&2; exit 1; }
output=$(mktemp "$PWD/trireme-example.XXXXXX")
trap 'rm -f "$output"' EXIT
status=0
# --wait: until the job is over, with its exit status.
sbatch --wait --nodes 2 --ntasks-per-node 2 --time 10 --output "$output" "$@" launch/slurm.sbatch \
  generate examples/models/stories260K --tp 2 --pp 2 --prompt "Once upon a time" --echo --max-tokens 200 || status=$?
cat "$output"
exit "$status"
