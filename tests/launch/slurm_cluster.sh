# shellcheck shell=bash
# A Slurm cluster of two nodes on this machine, for tests: munged, slurmctld and two slurmd started by hand, with all files
# in one folder. Each node has its own host name, /dev/shm and IPC (namespaces); the network is the machine's. Sourced by
# tests/launch/slurm_test.sh. Needs root and Debian's slurm-wlm and munge.

# Why there can be no cluster here; empty when there can.
slurm_cluster_lacks() {
  local program
  [[ $(id -u) == 0 ]] || { echo "not root, and slurmd starts tasks as other users"; return; }
  for program in slurmctld slurmd munged srun sbatch; do
    command -v "$program" >/dev/null || { echo "no $program (Debian packages slurm-wlm, munge)"; return; }
  done
  unshare --mount --uts --ipc true 2>/dev/null || echo "this machine or container forbids namespaces"
}

slurm_write_config() {
  local folder=$1 port=$2 host
  host=$(hostname -s)
  # config_overrides: nodes may claim more cores than there are. TmpFS with %n: two nodes share this disk.
  cat >"$folder/slurm.conf" <<C
ClusterName=trireme$port
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
TmpFS=$folder/local.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
SlurmctldPort=$port
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SchedulerParameters=batch_sched_delay=0
KillWait=1
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname=n[1-2] NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=10 State=UP OverSubscribe=YES
C
}

# slurm_cluster_start FOLDER: exports SLURM_CONF; fails with the daemons' words when no cluster comes up.
slurm_cluster_start() {
  local folder=$1 attempt node
  export SLURM_CONF=$folder/slurm.conf
  slurm_pids=()
  chmod 755 "$folder"
  dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 2>/dev/null && chmod 600 "$folder/munge.key"
  munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" >"$folder/munged.out" 2>&1 &
  slurm_pids+=($!)
  mkdir -p "$folder"/{state,spool.n1,spool.n2,local.n1,local.n2}
  # Below the ports the kernel gives to clients.
  slurm_write_config "$folder" $((20000 + (RANDOM % 4000) * 3))
  setsid slurmctld -D >"$folder/slurmctld.out" 2>&1 &
  slurm_pids+=($!)
  for node in n1 n2; do
    setsid unshare --mount --uts --ipc sh -c 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && exec slurmd -D -N "$0"' \
      $node >"$folder/slurmd.$node.out" 2>&1 &
    slurm_pids+=($!)
  done
  for ((attempt = 0; attempt < 150; ++attempt)); do
    [[ $(sinfo -h -N -o %t 2>/dev/null | sort | tr '\n' ' ') == "idle idle " ]] && return 0
    sleep 0.2
  done
  tail -n 3 "$folder"/*.out "$folder"/*.log
  return 1
}

# Ends jobs, daemons and what they started, whatever state they are in. The folder is the caller's.
slurm_cluster_stop() {
  local folder=$1 pid
  ((${#slurm_pids[@]})) || return 0  # stopped already: its commands would wait for an answer
  if [[ -n "${SLURM_CONF-}" && -f "$SLURM_CONF" ]]; then
    timeout 5 scancel --state=RUNNING --state=PENDING --user=root 2>/dev/null
    for ((attempt = 0; attempt < 25; ++attempt)); do
      [[ -n "$(timeout 2 squeue -h 2>/dev/null)" ]] || break
      sleep 0.2
    done
  fi
  for pid in "${slurm_pids[@]}"; do kill "$pid" 2>/dev/null; done
  sleep 0.5
  for pid in "${slurm_pids[@]}"; do kill -KILL "$pid" 2>/dev/null; done
  wait "${slurm_pids[@]}" 2>/dev/null
  # Steps outlive slurmd by design; theirs is the folder's configuration.
  for pid in $(slurm_left_behind "$folder"); do kill -KILL "$pid" 2>/dev/null; done
  slurm_pids=()
}

# Processes that still have to do with this cluster: their environment or their arguments name its folder.
slurm_left_behind() {
  local folder=$1 process pid
  for process in /proc/[0-9]*; do
    pid=${process#/proc/}
    [[ $pid != "$$" && $pid != "$BASHPID" ]] || continue
    [[ $(stat -c %u "$process" 2>/dev/null) == 0 ]] || continue
    # The shells that run the test have the folder in their variables, but not in their environment.
    if grep -qsaF -- "SLURM_CONF=$folder/" "$process/environ"; then
      ancestor_of_test "$pid" || echo "$pid"
    fi
  done
}

# Children of the test itself, such as the command substitution that asks.
ancestor_of_test() {
  local pid=$1
  while ((pid > 1)); do
    [[ $pid == "$$" ]] && return 0
    pid=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status" 2>/dev/null) || return 1
    pid=${pid:-0}
  done
  return 1
}
