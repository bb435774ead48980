#!/usr/bin/env bash
# Ranks that the program starts itself, the doctor, and launches that cannot work.
# Usage: cli_launch_test.sh TRIREME MPIEXEC MODELS_DIR
. "$(dirname "$0")/cli_expect.sh"

# Ranks that the program starts itself.
expect 0 '"littles_law"' "$trireme" bench serving "$model" --ranks 2 --num-prompts 8 --max-len 32 --request-rates 200
expect 0 '"ranks": 2' "$trireme" bench mol --ranks 2 --shape 2x2x16 --items 500 --batch 1 --iterations 1
for restarts in 0 2; do
  expect 0 'upon|there|was' "$trireme" generate "$model" --ranks 4 --tp 2 --pp 2 --max-restarts $restarts --prompt "Once upon a time" --max-tokens 20
done
expect 2 '--ranks N instead' $(ranks 2) generate "$model" --prompt x --max-restarts 1
expect 2 '--ranks 2: mpirun or srun' $(ranks 2) generate "$model" --prompt x --ranks 2
expect 1 'vocabulary' "$trireme" generate "$model" --prompt-ids 1,512 --ranks 2 --max-restarts 3

# Two jobs at once share no name.
# With restarts their output does not come by mpirun.
two() { "$trireme" generate "$model" --ranks 2 --max-restarts 1 --prompt "Once upon a time" --max-tokens 300 --ignore-eos >"$1" 2>/dev/null; }
two "$work/first" & other=$!
two "$work/second"
wait $other
if [ -s "$work/first" ] && cmp -s "$work/first" "$work/second"; then passed=$((passed + 1)); else fail "two jobs at once"; fi

# doctor, and the same lines at the start of a command. Launchers of other kinds: slurm_test.sh, two_hosts_test.sh.
expect 0 'started alone' "$trireme" doctor
expect 0 'Nothing is wrong' $(ranks 4) doctor "$model" --tp 2 --pp 2
expect 0 '"mpi_loaded": "[0-9]' "$trireme" doctor --json
expect_doctor() {  # STATUS 'regex of a line' COMMAND...: its findings are on stdout, and its own last line says what follows
  local status=$1 pattern=$2; shift 2
  timeout 60 "$@" >"$work/out" 2>"$work/err"; local got=$?
  if [ "$got" != "$status" ] || ! grep -qE -e "$pattern" "$work/out" || ! tail -n 1 "$work/out" | grep -q 'This job cannot work'; then
    fail "$* : exit status $got, not $status, or no '$pattern' in: $(head -c 400 "$work/out") $(head -c 200 "$work/err")"; return
  fi
  passed=$((passed + 1))
}
expect_doctor 1 '--tp 2 --pp 2: needs 4 ranks and there are 3: mpirun -n 4, .*\(rank-count\)' $(ranks 3) doctor --tp 2 --pp 2
expect_doctor 1 'and 4096 ranks are wanted.*\(slots\)' env -u OMPI_MCA_rmaps_base_oversubscribe -u PRTE_MCA_rmaps_default_mapping_policy "$trireme" doctor --tp 4096
expect_doctor 1 'mpirun is not on PATH.*\(no-mpirun\)' env PATH=/nowhere "$work/trireme" doctor --tp 2
expect_doctor 1 'nothere/config.json' "$trireme" doctor "$work/nothere"
printf 'localhost slots=2\nno-such-host.invalid slots=2\n' >"$work/hosts"
expect_doctor 1 'hosts:2: host "no-such-host.invalid" has no address.*\(unknown-host\)' "$trireme" doctor --hostfile "$work/hosts"
# Slots are those of the hostfile, and no limit where more ranks than slots may be.
printf 'localhost slots=3\n127.0.0.1 max_slots=2\n' >"$work/hosts"
expect 0 'Nothing is wrong' "$trireme" doctor --hostfile "$work/hosts" --tp 8
expect 0 'Nothing is wrong' env -u OMPI_MCA_rmaps_base_oversubscribe -u PRTE_MCA_rmaps_default_mapping_policy "$trireme" doctor --hostfile "$work/hosts" --tp 5
expect_doctor 1 'hosts has 5 slots in all and 6 ranks are wanted.*\(slots\)' \
  env -u OMPI_MCA_rmaps_base_oversubscribe -u PRTE_MCA_rmaps_default_mapping_policy "$trireme" doctor --hostfile "$work/hosts" --tp 6
expect 0 'mpi_loaded' env "OMPI_X=$(printf '\377')" "$trireme" doctor --json
expect_doctor 1 'nohosts: cannot be read' "$trireme" doctor --hostfile "$work/nohosts"
[ "$(id -u)" != 0 ] || expect_doctor 1 'refuses to run as root.*\(root\)' env -u OMPI_ALLOW_RUN_AS_ROOT "$trireme" doctor --tp 2

# Started in a way that cannot work: a line, before MPI says a page.
slurm_step="SLURM_STEP_ID=0 SLURM_STEPID=0 SLURM_JOB_ID=7 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0"
for command in "generate $model --prompt x" "eval $model --ids $work/ids" "bench latency $model" "inspect $model"; do
  expect 1 'srun started 4 tasks with --mpi=none.*use srun --mpi=pmix' env $slurm_step "$trireme" $command
done
expect_doctor 1 'srun started 4 tasks with --mpi=pmi2' env $slurm_step SLURM_MPI_TYPE=pmi2 "$trireme" doctor
expect 1 'Slurm did not start this process.*unset' env $slurm_step SLURM_TASK_PID=999999999 "$trireme" generate "$model" --prompt x
expect 1 'mpiexec of another MPI' env PMI_RANK=0 PMI_SIZE=4 PMI_FD=9 "$trireme" generate "$model" --prompt x
expect 1 'OMPI_MCA_btl_tcp_if_include=lo is this host alone' env OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_MCA_btl_tcp_if_include=lo "$trireme" generate "$model" --prompt x
expect 1 'mpirun started 2 ranks but MPI sees 1' env OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 "$trireme" inspect "$model"
# One task of a step is a job of its own; a batch script is no step.
expect 0 'first token' env $slurm_step SLURM_STEP_NUM_TASKS=1 "$trireme" generate "$model" --prompt x --max-tokens 2
expect 0 'first token' env SLURM_JOB_ID=7 SLURM_NTASKS=4 SLURM_PROCID=0 "$trireme" generate "$model" --prompt x --max-tokens 2
# Variables set to anything. Open MPI would read these.
for garbage in banana -1 '' 99999999999999999999 "$(printf '\001\377')"; do
  for name in OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK PMIX_RANK SLURM_PROCID SLURM_STEP_NUM_TASKS; do
    expect 1 "$name is .* and no launcher sets it so" env SLURM_STEP_ID=0 "$name=$garbage" "$trireme" generate "$model" --prompt x --max-tokens 2
  done
  for name in PMI_RANK PMI_FD SLURM_PROCID SLURM_JOB_ID SLURM_NTASKS SLURM_TASKS_PER_NODE SLURM_TASK_PID CUDA_VISIBLE_DEVICES NCCL_SOCKET_IFNAME; do
    expect 0 'first token' env "$name=$garbage" "$trireme" generate "$model" --prompt x --max-tokens 2
  done
done

# Two jobs at once on one machine: no name of one is in the other's way.
"$mpiexec" -np 2 "$trireme" generate "$model" --tp 2 --prompt "Once upon a time" --max-tokens 200 --ignore-eos >"$work/alone" 2>/dev/null
for i in 1 2 3; do
  "$mpiexec" -np 2 "$trireme" generate "$model" --tp 2 --prompt "Once upon a time" --max-tokens 200 --ignore-eos >"$work/job$i" 2>"$work/job$i.err" &
  jobs[i]=$!
done
for i in 1 2 3; do
  if wait "${jobs[i]}" && cmp -s "$work/job$i" "$work/alone"; then passed=$((passed + 1)); else fail "one of three jobs at once: $(head -c 400 "$work/job$i.err")"; fi
done

# --ranks starts mpirun itself: on this machine, whatever Slurm's variables say, and with the doctor's own words.
expect 0 'upon|there|was' env SLURM_JOB_ID=77 SLURM_JOBID=77 'SLURM_NODELIST=n[1-2]' 'SLURM_TASKS_PER_NODE=1(x2)' SLURM_NNODES=2 \
  SLURM_NTASKS=2 "$trireme" generate "$model" --ranks 2 --prompt "Once upon a time" --max-tokens 20
expect 1 '(no-mpirun)' env PATH=/nonexistent "$trireme" generate "$model" --ranks 2 --max-restarts 2 --prompt x
# Of another MPI: it would be started in vain, again and again. One that prints nothing may be Open MPI's all the same.
mkdir "$work/mpich" "$work/mute"
printf '#!/bin/sh\n[ "$*" = --version ] || echo "$@" >>"%s/started"\nprintf "HYDRA build details:\\n    Version: 4.0.2\\n"\n' "$work" >"$work/mpich/mpirun"
printf '#!/bin/sh\n[ "$*" = --version ] || exec "%s" "$@"\n' "$(command -v "$mpiexec")" >"$work/mute/mpirun"
chmod +x "$work/mpich/mpirun" "$work/mute/mpirun"
expect 1 "^trireme: $work/mpich/mpirun is not Open MPI's mpirun .*HYDRA build details:.*\(foreign-mpirun\)\$" \
  env "PATH=$work/mpich:$PATH" "$trireme" generate "$model" --ranks 2 --max-restarts 3 --prompt x
[ -e "$work/started" ] && fail "another MPI's mpirun was started with $(cat "$work/started")"
expect_doctor 1 "is not Open MPI's mpirun .*\(foreign-mpirun\)" env "PATH=$work/mpich:$PATH" "$trireme" doctor --tp 2
expect 0 'first token' env "PATH=$work/mute:$PATH" "$trireme" generate "$model" --ranks 2 --prompt x --max-tokens 2
# Without a folder for its files MPI would crash, or mpirun end with pages.
for folder in /dev/null /proc "$work/nothere"; do
  expect 1 "MPI keeps files of its own in $folder, .*\(session-folder\)" env TMPDIR="$folder" "$trireme" generate "$model" --prompt x
  expect 1 "MPI keeps files of its own in $folder" env TMPDIR="$folder" "$trireme" generate "$model" --ranks 2 --prompt x
  expect_doctor 1 "MPI keeps files of its own in $folder" env TMPDIR="$folder" "$trireme" doctor
done

# The doctor looks at weights as loading would.
mkdir "$work/short"; cp "$(readlink -f "$model")/config.json" "$work/short/"
expect_doctor 1 'has neither model.safetensors nor' "$trireme" doctor "$work/short"
echo x >"$work/short/model.safetensors"
expect_doctor 1 'model.safetensors' "$trireme" doctor "$work/short"

# What only MPI itself knows is tried: a value that every Open MPI refuses, one of an mpirun, and one that breaks nothing.
refused=OMPI_MCA_hwloc_base_mem_bind_failure_action
expect 1 "MPI does not start with $refused=\"garbage\": unset $refused" env $refused=garbage "$trireme" generate "$model" --prompt x
expect 1 "MPI does not start with $refused=\"garbage\": unset $refused" env $refused=garbage "$trireme" generate "$model" --ranks 2 --prompt x
expect_doctor 1 "MPI does not start with $refused=.*\(garbage-variable\)" env $refused=garbage OMPI_MCA_btl_base_verbose=0 "$trireme" doctor
for agent in OMPI_MCA_rmaps_base_ranking_policy PRTE_MCA_rmaps_default_ranking_policy; do
  env $agent=garbage mpirun -n 1 true >"$work/out" 2>&1 && continue  # of another Open MPI
  expect 1 "MPI does not start with $agent=\"garbage\"" env $agent=garbage "$trireme" generate "$model" --ranks 2 --max-restarts 2 --prompt x
  expect_doctor 1 "MPI does not start with $agent=" env $agent=garbage "$trireme" doctor
done
expect 0 'first token' env OMPI_MCA_btl_base_verbose=0 "$trireme" generate "$model" --ranks 2 --prompt x --max-tokens 2
expect 1 'OMPI_MCA_coll names "garbage"' env OMPI_MCA_coll=garbage "$trireme" generate "$model" --ranks 2 --max-restarts 2 --prompt x
expect 1 'OMPI_MCA_shmem names "garbage"' env OMPI_MCA_shmem=mmap,garbage "$trireme" generate "$model" --ranks 2 --max-restarts 2 --prompt x

finish
