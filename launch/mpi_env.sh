# shellcheck shell=bash
# Open MPI settings for all ranks on this one machine, whatever it is: root, container, more ranks than cores. Sourced by
# launch/quickstart.sh and tests/run.sh; what the user has set already stays. On a cluster leave these to its admins.
# Open MPI 4 (Debian 12, Ubuntu 24.04) reads OMPI_*; in Open MPI 5 (Debian 13) mpirun itself reads PRTE_*.

set_default() { [[ -n "${!1-}" ]] || export "$1=$2"; }

single_node_mpi_environment() {
  # As root, which is what a container gives.
  set_default OMPI_ALLOW_RUN_AS_ROOT 1
  set_default OMPI_ALLOW_RUN_AS_ROOT_CONFIRM 1
  set_default PRTE_ALLOW_RUN_AS_ROOT 1
  set_default PRTE_ALLOW_RUN_AS_ROOT_CONFIRM 1
  # Shared memory only: probing for fabrics costs 0.2 s at every start, and of sockets a machine with unusual interfaces
  # prints a line per rank.
  set_default OMPI_MCA_pml ob1
  set_default OMPI_MCA_btl self,vader
  # More ranks than cores: a waiting rank must give its core away, or a collective takes 10 ms instead of 10 us.
  set_default OMPI_MCA_mpi_yield_when_idle 1
  set_default OMPI_MCA_hwloc_base_binding_policy none
  set_default OMPI_MCA_rmaps_base_oversubscribe 1
  set_default PRTE_MCA_hwloc_default_binding_policy none
  set_default PRTE_MCA_rmaps_default_mapping_policy :oversubscribe
  set_default OMP_WAIT_POLICY passive
  # mpirun insists on a remote shell even when all ranks are local.
  if ! command -v ssh >/dev/null && ! command -v rsh >/dev/null; then
    set_default OMPI_MCA_plm_rsh_agent /bin/false
    set_default PRTE_MCA_plm_ssh_agent /bin/false
  fi
  # A seccomp filter (container) may forbid reading another process's memory; Open MPI would print errors and go on.
  if grep -q '^Seccomp:[[:space:]]*2' /proc/self/status 2>/dev/null; then
    set_default OMPI_MCA_btl_vader_single_copy_mechanism none
    set_default OMPI_MCA_btl_sm_single_copy_mechanism none
  fi
  # Each rank maps a few MB there.
  local shm_kb
  shm_kb=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $4}')
  if [[ ! -w /dev/shm || ${shm_kb:-0} -lt 49152 ]]; then
    set_default OMPI_MCA_btl_vader_backing_directory "${TMPDIR:-/tmp}"
    set_default OMPI_MCA_btl_sm_backing_directory "${TMPDIR:-/tmp}"
  fi
}
