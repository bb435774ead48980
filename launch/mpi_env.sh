# shellcheck shell=bash
# single_node_mpi_environment exports the settings of launch/single_node.env, which says what each is for. Sourced by
# launch/quickstart.sh and tests/run.sh; what the user has set already stays.

single_node_mpi_settings=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)/single_node.env

# Whether a setting with this WHEN is for this machine.
single_node_mpi_applies() {
  case $1 in
    '') ;;
    no-remote-shell) ! command -v ssh >/dev/null && ! command -v rsh >/dev/null ;;
    seccomp) grep -q '^Seccomp:[[:space:]]*2' /proc/self/status 2>/dev/null ;;
    small-shm)
      local free_kb
      free_kb=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $4}')
      [[ ! -w /dev/shm || ${free_kb:-0} -lt 49152 ]]
      ;;
    *) return 1 ;;
  esac
}

single_node_mpi_environment() {
  local name value when
  while read -r name value when; do
    if [[ -z $name || $name == \#* || -n "${!name-}" ]] || ! single_node_mpi_applies "$when"; then continue; fi
    # shellcheck disable=SC2016
    [[ $value != '$TMPDIR' ]] || value=${TMPDIR:-/tmp}
    export "$name=$value"
  done <"$single_node_mpi_settings"
}
