#!/usr/bin/env bash
# Jobs on a Slurm cluster of two nodes, both on this machine: srun --mpi=pmix, mpirun inside sbatch, launch/slurm.sbatch,
# and the ways of starting that cannot work.
# Usage: slurm_test.sh TRIREME SOURCE_DIR
set -u
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tests/launch/slurm_cluster.sh
source "$here/slurm_cluster.sh"
reason=$(slurm_cluster_lacks)
if [[ -n $reason ]]; then
  echo "SKIPPED: jobs under Slurm: $reason"
  exit 0
fi

slurm_pids=()
work=$(mktemp -d "${TMPDIR:-/tmp}/trireme-slurm.XXXXXX") || exit 1
finish() {
  slurm_cluster_stop "$work"
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 1' INT TERM HUP
trireme=$1 source=$2
model=$source/examples/models/stories260K
passed=0 failed=0
pass() { passed=$((passed + 1)); }
fail() { printf 'FAILED: %s\n' "$*"; failed=$((failed + 1)); }

slurm_cluster_start "$work" || { fail "the cluster did not come up"; exit 1; }

# What tests/mpi_test.cmake sets for one machine would leave the nodes without a network between them.
unset OMPI_MCA_btl OMPI_MCA_pml OMPI_MCA_plm_rsh_agent
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
story=(generate "$model" --prompt "Once upon a time" --max-tokens 60)
"$trireme" "${story[@]}" >"$work/alone" 2>"$work/alone.err" || fail "alone: $(cat "$work/alone.err")"

# expect STATUS 'regex' COMMAND...: of its output and errors together, which must have at most one line of ours.
expect() {
  local status=$1 pattern=$2 got; shift 2
  timeout -k 5 60 "$@" >"$work/out" 2>&1 </dev/null; got=$?
  if [[ $got != "$status" ]]; then fail "$* : exit status $got, not $status: $(head -c 600 "$work/out")"; return; fi
  if ! grep -qE -e "$pattern" "$work/out"; then fail "$* : no '$pattern' in: $(head -c 600 "$work/out")"; return; fi
  if (($(grep -c '^trireme:' "$work/out") > 1)); then fail "$* : more than one line: $(head -c 600 "$work/out")"; return; fi
  pass
}
# same_story NAME FILE: the story is in the file, letter for letter that of a single process.
same_story() {
  if grep -qF -- "$(head -n 1 "$work/alone")" "$2"; then pass; else fail "$1: another story: $(head -c 600 "$2")"; fi
}

pmix=1
srun --mpi=list 2>&1 | grep -qw pmix || pmix=0
if ((pmix)); then
  expect 0 'warning: .*export SLURM_PMIX_FENCE=ring before srun \(slurm-fence\)' srun -N2 -n4 --mpi=pmix "$trireme" doctor
  # That was no empty warning: Slurm 22.05 crashes Open MPI 4.1.4 once in 40 starts here without this.
  export SLURM_PMIX_FENCE=ring
  timeout 60 srun -N2 -n4 --ntasks-per-node=2 --mpi=pmix "$trireme" "${story[@]}" --tp 2 --pp 2 >"$work/out" 2>&1 || fail "srun: $(cat "$work/out")"
  same_story "srun --mpi=pmix" "$work/out"
  expect 0 'by srun with PMIx, rank 0 of 4 \(4 ranks on 2 hosts' srun -N2 -n4 --ntasks-per-node=2 --mpi=pmix "$trireme" doctor "$model" --tp 2 --pp 2
  expect 0 'Nothing is wrong' srun -N1 -n2 --mpi=pmix "$trireme" doctor
  expect 2 '--tp 3: needs a multiple of 3 ranks and there are 4.*rank-count' srun -N2 -n4 --mpi=pmix "$trireme" "${story[@]}" --tp 3
else
  echo "SKIPPED: srun --mpi=pmix: Slurm has no PMIx plugin here"
fi

# What Open MPI cannot use: one line for all ranks, and it names the remedy.
expect 1 '^trireme: srun started 3 tasks with --mpi=pmi2.*use srun --mpi=pmix.*\(srun-without-pmix\)$' srun -N1 -n3 --mpi=pmi2 "$trireme" "${story[@]}"
expect 1 '^trireme: srun started 4 tasks with --mpi=none.*use srun --mpi=pmix' srun -N2 -n4 --mpi=none "$trireme" "${story[@]}"
expect 1 '^error: srun started 4 tasks.*\(srun-without-pmix\)' srun -N2 -n4 --mpi=none "$trireme" doctor
# A step of one task needs no PMI.
timeout 60 srun -n1 --mpi=none "$trireme" "${story[@]}" >"$work/out" 2>&1 || fail "srun of one task: $(cat "$work/out")"
same_story "srun -n1 --mpi=none" "$work/out"

# Batch jobs.
cat >"$work/ranks.env" <<END
NCCL_DEBUG=from-the-file
END
export TRIREME=$trireme TRIREME_ENVIRONMENT=$work/ranks.env
# batch OPTIONS... SCRIPT ARGUMENTS...: submits a job and waits for its end; fails as it does. sbatch --wait looks every
# ten seconds only.
batch() {
  local job state attempt
  job=$(timeout 30 sbatch --parsable "$@") || return 1
  for ((attempt = 0; attempt < 900; ++attempt)); do
    state=$(scontrol --oneliner show job "$job" 2>/dev/null)
    case $state in
      *JobState=COMPLETED*) return 0 ;;
      *JobState=PENDING* | *JobState=RUNNING* | *JobState=CONFIGURING* | *JobState=COMPLETING*) sleep 0.1 ;;
      *) return 1 ;;
    esac
  done
  scancel "$job"
  return 1
}
# submit NAME OPTIONS... -- COMMAND...: runs launch/slurm.sbatch to its end; its output is $work/NAME.
submit() {
  local name=$1 options=(); shift
  while [[ $1 != -- ]]; do options+=("$1"); shift; done
  shift
  batch --output="$work/$name" "${options[@]}" "$source/launch/slurm.sbatch" "$@"
}
cd "$work" || exit 1
unset SLURM_PMIX_FENCE  # launch/slurm.sbatch sets it
for launcher in mpirun srun; do
  if [[ $launcher == srun ]] && ! ((pmix)); then continue; fi
  export TRIREME_LAUNCHER=$launcher
  submit "batch.$launcher" -N2 --ntasks-per-node=2 -- "${story[@]}" --tp 2 --pp 2 || fail "sbatch with $launcher: $(cat "$work/batch.$launcher")"
  same_story "sbatch with $launcher" "$work/batch.$launcher"
  submit "doctor.$launcher" -N2 --ntasks-per-node=2 -- doctor "$model" --json --tp 4 || fail "doctor with $launcher: $(cat "$work/doctor.$launcher")"
  if grep -q '"NCCL_DEBUG": "from-the-file"' "$work/doctor.$launcher" && grep -q '(4 ranks on 2 hosts' "$work/doctor.$launcher"; then pass; else fail "the environment file with $launcher: $(cat "$work/doctor.$launcher")"; fi
  # The job fails when the command does.
  if submit "usage.$launcher" -N1 --ntasks-per-node=2 -- "${story[@]}" --tp 3; then fail "a failed command with $launcher counts as done"; else pass; fi
  if grep -q 'rank-count' "$work/usage.$launcher"; then pass; else fail "no reason given with $launcher: $(cat "$work/usage.$launcher")"; fi
done
unset TRIREME_LAUNCHER
if submit nothing -N1 -- ; then fail "no command counts as done"; fi
if grep -q 'no command' "$work/nothing"; then pass; else fail "no command: $(cat "$work/nothing")"; fi
# What examples/slurm/submit.sh shows.
timeout -k 5 90 "$source/examples/slurm/submit.sh" >"$work/example" 2>&1 || fail "examples/slurm/submit.sh failed"
if grep -q 'Once upon a time' "$work/example"; then pass; else fail "examples/slurm/submit.sh: $(cat "$work/example")"; fi

# Variables of a job that ended, in a shell that Slurm did not start.
cat >"$work/print.sh" <<'END'
#!/bin/bash
env | grep '^SLURM_' | grep -v SLURM_CONF | sed "s/=\(.*\)/='\1'/; s/^/export /"
END
batch -N1 -n2 --output="$work/stale" "$work/print.sh"
expect 1 'SLURM_\* variables of job [0-9]+ are set, but Slurm did not start this process.*\(stale-slurm\)' bash -c "source $work/stale; '$trireme' doctor --tp 2"
expect 0 'first token' bash -c "source $work/stale; '$trireme' generate '$model' --prompt x --max-tokens 2"

# A cancelled job leaves nobody.
yes "Once upon a time" | head -n 5000 >"$work/many.txt"
printf '%s' "$work/many.txt" >"$work/name"  # in a file: a command line with it would find itself
ranks_running() { grep -qsF -f "$work/name" /proc/[0-9]*/cmdline; }
cat >"$work/long.sh" <<END
#!/bin/bash
mpirun '$trireme' generate '$model' --prompts $work/many.txt --max-tokens 20 --ignore-eos
END
job=$(sbatch --parsable -N2 --ntasks-per-node=2 --output="$work/long" "$work/long.sh")
for ((i = 0; i < 300; ++i)); do [[ -s $work/long ]] && break; sleep 0.1; done
if [[ -s $work/long ]] && ranks_running; then pass; else fail "the job to be cancelled does not run: $(head -c 600 "$work/long")"; fi
scancel "$job"
for ((i = 0; i < 100; ++i)); do ranks_running || break; sleep 0.1; done
if ranks_running; then fail "ranks of a cancelled job are left"; else pass; fi

slurm_cluster_stop "$work"
left=$(slurm_left_behind "$work")
if [[ -z $left ]]; then pass; else fail "left behind: $left"; fi
printf '%d passed, %d failed\n' "$passed" "$failed"
[[ $failed == 0 ]]
