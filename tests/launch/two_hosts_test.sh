#!/usr/bin/env bash
# mpirun across two hosts made of network namespaces: the same text as on one, and what may be wrong between hosts.
# Usage: two_hosts_test.sh TRIREME SOURCE_DIR
set -u
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tests/launch/two_hosts.sh
source "$here/two_hosts.sh"
reason=$(two_hosts_lack)
if [[ -n $reason ]]; then
  echo "SKIPPED: jobs across two hosts: $reason"
  exit 0
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/trireme-hosts.XXXXXX") || exit 1
finish() {
  two_hosts_stop
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 1' INT TERM HUP
trireme=$1
cp -r "$2/examples/models/stories260K" "$work/model"
model=$work/model
passed=0 failed=0
pass() { passed=$((passed + 1)); }
fail() { printf 'FAILED: %s\n' "$*"; failed=$((failed + 1)); }

two_hosts_start "$work" || { fail "the hosts could not be made"; exit 1; }
# What tests/mpi_test.cmake sets for one machine would leave the hosts without a network between them.
unset OMPI_MCA_btl OMPI_MCA_pml OMPI_MCA_plm_rsh_agent OMPI_MCA_rmaps_base_oversubscribe OMPI_MCA_hwloc_base_binding_policy
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# expect STATUS 'regex' COMMAND...: of its output and errors together, which must have at most one line of ours.
expect() {
  local status=$1 pattern=$2 got; shift 2
  "$@" >"$work/out" 2>&1 </dev/null; got=$?
  if [[ $got != "$status" ]]; then fail "$* : exit status $got, not $status: $(head -c 900 "$work/out")"; return; fi
  if ! grep -qE -e "$pattern" "$work/out"; then fail "$* : no '$pattern' in: $(head -c 900 "$work/out")"; return; fi
  if (($(grep -c '^trireme:' "$work/out") > 1)); then fail "$* : more than one line: $(head -c 900 "$work/out")"; return; fi
  pass
}
# A hang must end: mpirun itself is asked first, then killed.
limited() { timeout -k 5 40 bash -c 'source "$0"; two_hosts_folder=$1; shift; across "$@"' "$work/functions" "$work" "$@"; }
# The functions, with this test's names of namespaces.
sed "s/\\\$\\\$/$$/g" "$here/two_hosts.sh" >"$work/functions"

story=(generate "$model" --prompt "Once upon a time" --max-tokens 60)
"$trireme" "${story[@]}" >"$work/alone" 2>/dev/null || fail "alone"
same_story() {
  if limited 4 "$trireme" "${story[@]}" "$@" >"$work/story" 2>"$work/err" && cmp -s "$work/story" "$work/alone"; then
    pass
  else
    fail "$*: another story: $(head -c 600 "$work/story") $(head -c 900 "$work/err")"
  fi
}
for layout in "--tp 2 --pp 2" "--tp 4" "--pp 4"; do
  # shellcheck disable=SC2086
  same_story $layout
done
expect 0 'by mpirun, rank 0 of 4 \(4 ranks on 2 hosts\)' limited 4 "$trireme" doctor "$model" --tp 2 --pp 2
expect 0 'Nothing is wrong' limited 4 "$trireme" doctor "$model" --tp 2 --pp 2

# Docker's bridge has the same address on every host, and Open MPI 4.1 takes it for a network between them: it connects to
# itself and waits for ever. We leave such bridges out.
for host in a b; do
  on_host_network $host ip link add docker0 type bridge 2>/dev/null || on_host_network $host ip link add docker0 type veth peer name unused
  on_host_network $host ip addr add 172.17.0.1/16 dev docker0
  on_host_network $host ip link set docker0 up
  ! on_host_network $host ip link set unused up 2>/dev/null || true
done
same_story --tp 2 --pp 2
# Whoever insists is told, at once.
for network in lo 127.0.0.0/8 docker0; do
  expect 1 "OMPI_MCA_btl_tcp_if_include=$network .*\\(wrong-network\\)" limited 4 -x "OMPI_MCA_btl_tcp_if_include=$network" "$trireme" "${story[@]}"
done
same_story --tp 4
for host in a b; do on_host_network $host ip link del docker0; done

# The second host has another checkpoint, part of one, none.
cp -r "$model" "$work/other"
other() { printf 'mount --bind %s %s\n' "$1" "$2" >"$work/nodeb.mounts"; }
sed -i 's/"rope_theta": [0-9.]*/"rope_theta": 12345.0/' "$work/other/config.json"
other "$work/other" "$model"
expect 1 'host nodeb has another config.json than nodea.*\(other-checkpoint\)' limited 4 "$trireme" "${story[@]}"
expect 1 'error: host nodeb has another config.json' limited 4 "$trireme" doctor "$model"
cp "$model/config.json" "$work/other"; rm "$work/other/model.safetensors"
expect 1 'host nodeb lacks model.safetensors, which nodea has' limited 4 "$trireme" "${story[@]}"
# Without a model a difference of models is none.
expect 0 'Nothing is wrong' limited 4 "$trireme" doctor

# Another build of the program: the same code under another build id.
if command -v objcopy >/dev/null; then
  cp "$trireme" "$work/trireme"; objcopy --remove-section .note.gnu.build-id "$trireme" "$work/trireme.other"
  other "$work/trireme.other" "$work/trireme"
  expect 1 'ranks 1, 3 on nodeb run another build of this program \(unknown\) than rank 0 on nodea.*\(other-binary\)' limited 4 "$work/trireme" "${story[@]}"
else
  echo "SKIPPED: another binary on the second host: no objcopy (Debian package binutils)"
fi

# The second host has no room in /dev/shm; its own first rank says so.
printf 'mount -t tmpfs -o size=4m tmpfs /dev/shm\n' >"$work/nodeb.mounts"
expect 1 '/dev/shm of host nodeb has 4 MiB free and 2 ranks need 10 MiB.*\(small-shm\)' limited 4 "$trireme" "${story[@]}"
expect 1 'error: /dev/shm of host nodeb has 4 MiB free' limited 4 "$trireme" doctor
rm "$work/nodeb.mounts"

# A hostfile with a host that nobody knows: mpirun ends, and the doctor names the line beforehand.
cp "$work/hosts" "$work/hosts.good"
echo 'no-such-host.invalid slots=2' >>"$work/hosts"
begin=$SECONDS
limited 6 "$trireme" "${story[@]}" >"$work/out" 2>&1; got=$?
if ((got == 0)); then fail "an unknown host was no failure"; elif ((SECONDS - begin > 20)); then fail "an unknown host: mpirun took $((SECONDS - begin)) s"; else pass; fi
grep -q 'no-such-host' "$work/out" || fail "an unknown host is not named: $(head -c 600 "$work/out")"
expect 1 'hosts:3: host "no-such-host.invalid" has no address' "$trireme" doctor --hostfile "$work/hosts"
cp "$work/hosts.good" "$work/hosts"
same_story --pp 2 --dp 2

# A host is lost while a job runs: the cable is out. The other one says so, and both end what runs on them themselves.
yes "Once upon a time" | head -n 4000 >"$work/many.txt"
limited 4 "$trireme" generate "$model" --tp 2 --pp 2 --prompts "$work/many.txt" --json --max-tokens 100 --ignore-eos \
  --failure-timeout 2 --flight-records none >"$work/lost" 2>"$work/lost.err" &
job=$!
for ((i = 0; i < 300; ++i)); do [[ -s $work/lost ]] && break; sleep 0.1; done
on_host_network b ip link set eth0 down
begin=$SECONDS
for ((i = 0; i < 200; ++i)); do grep -q '^trireme: rank' "$work/lost.err" && break; sleep 0.1; done
if ((SECONDS - begin > 10)); then fail "a lost host was noticed after $((SECONDS - begin)) s"; else pass; fi
if wait $job; then fail "the loss of a host counts as done"; else pass; fi
if ((SECONDS - begin > 20)); then fail "mpirun ended $((SECONDS - begin)) s after the loss of a host"; else pass; fi
if (($(grep -cE '^trireme: rank [13] \(nodeb, pid [0-9]+\) (gave no sign of life for|cannot be reached any more,).* in (prefill|decode)' "$work/lost.err") == 1)); then
  pass
else
  fail "the lost host is not named once: $(wc -l <"$work/lost") answers, $(head -c 3000 "$work/lost.err")"
fi
for ((i = 0; i < 200; ++i)); do [[ -n $(two_hosts_processes) ]] || break; sleep 0.1; done
if [[ -z $(two_hosts_processes) ]]; then pass; else fail "left behind after the loss of a host: $(two_hosts_processes | xargs -r ps -o pid,args -p)"; fi
on_host_network b ip link set eth0 up
same_story --pp 4

# Nobody is left on either host.
for ((i = 0; i < 50; ++i)); do [[ -n $(two_hosts_processes) ]] || break; sleep 0.1; done
if [[ -z $(two_hosts_processes) ]]; then pass; else fail "left behind: $(two_hosts_processes | xargs -r ps -o pid,args -p)"; fi
printf '%d passed, %d failed\n' "$passed" "$failed"
[[ $failed == 0 ]]
