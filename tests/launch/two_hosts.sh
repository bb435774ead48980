# shellcheck shell=bash
# Two hosts made of network namespaces, joined by a pair of virtual interfaces, each with its own host name, /dev/shm and IPC,
# and for each command that is run there its own table of processes:
# what mpirun and Open MPI can tell from two machines is as on two machines. Sourced by tests that start jobs across hosts.
# Needs root and iproute2.
#   two_hosts_start FOLDER   makes them: nodea 10.77.0.1 and nodeb 10.77.0.2; writes FOLDER/hosts, FOLDER/enter, FOLDER/agent
#   on_host a COMMAND...     runs a command there
#   across N ARGUMENTS...    mpirun -n N over both, from nodea
#   two_hosts_stop           removes them and whatever runs there
# A file FOLDER/nodeb.mounts is sourced in every process of nodeb, before the command: to give it files of its own.

# Why there can be no two hosts here; empty when there can.
two_hosts_lack() {
  local program
  [[ $(id -u) == 0 ]] || { echo "not root, and only root makes network namespaces"; return; }
  for program in ip unshare mpirun; do
    command -v "$program" >/dev/null || { echo "no $program (Debian packages iproute2, util-linux, openmpi-bin)"; return; }
  done
  if ! ip netns add "trprobe$$" 2>/dev/null; then echo "this machine or container forbids network namespaces"; return; fi
  ip link add "trp$$a" type veth peer name "trp$$b" 2>/dev/null || echo "this machine has no virtual Ethernet interfaces (veth)"
  ip link del "trp$$a" 2>/dev/null
  ip netns del "trprobe$$"
}

two_hosts_start() {
  two_hosts_folder=$1
  local host address
  for host in a b; do ip netns add "trireme$$$host" || return 1; done
  # Interface names have 15 characters at most.
  ip link add "tr$$a" type veth peer name "tr$$b" || return 1
  for host in a b; do
    address=10.77.0.$([[ $host == a ]] && echo 1 || echo 2)
    ip link set "tr$$$host" netns "trireme$$$host" || return 1
    on_host_network "$host" ip link set "tr$$$host" name eth0
    on_host_network "$host" ip addr add "$address/24" dev eth0
    on_host_network "$host" ip link set eth0 up
    on_host_network "$host" ip link set lo up
  done
  printf '10.77.0.1 slots=2\n10.77.0.2 slots=2\n' >"$1/hosts"
  cat >"$1/enter" <<END
#!/bin/bash
# HOST COMMAND...: namespaces of the host's own.
exec ip netns exec trireme$$\$1 unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc bash -c '
  hostname node\$0
  mount -t tmpfs -o size=\${TRIREME_TEST_SHM:-1g} tmpfs /dev/shm
  [ ! -f "$1/node\$0.mounts" ] || . "$1/node\$0.mounts"
  "\$@"; exit \$?' "\$@"
END
  # In place of ssh.
  cat >"$1/agent" <<END
#!/bin/bash
case \$1 in
  10.77.0.1) exec "$1/enter" a sh -c "\${*:2}" ;;
  10.77.0.2) exec "$1/enter" b sh -c "\${*:2}" ;;
  *) echo "agent: Could not resolve hostname \$1: Name or service not known" >&2; exit 255 ;;
esac
END
  chmod +x "$1/enter" "$1/agent"
}

on_host_network() { ip netns exec "trireme$$$1" "${@:2}"; }
on_host() { "$two_hosts_folder/enter" "$@"; }

across() {
  local ranks=$1; shift
  on_host a mpirun --hostfile "$two_hosts_folder/hosts" --mca plm_rsh_agent "$two_hosts_folder/agent" --map-by node \
    --bind-to none --mca oob_tcp_keepalive_time 5 --mca oob_tcp_keepalive_intvl 2 --mca oob_tcp_keepalive_probes 3 \
    -n "$ranks" "$@"
}

# Processes in either host.
two_hosts_processes() {
  local host
  for host in a b; do ip netns pids "trireme$$$host" 2>/dev/null; done
}

two_hosts_stop() {
  local pid host
  for pid in $(two_hosts_processes); do kill -KILL "$pid" 2>/dev/null; done
  for host in a b; do ip netns del "trireme$$$host" 2>/dev/null; done
  ip link del "tr$$a" 2>/dev/null
  return 0
}
