#!/usr/bin/env bash
# tests/gpu.sh, tests/bench/speed_table.py and launch/bundle.sh without a GPU: a folder of programs that only pretend, and an nvidia-smi that does.
# Usage: gpu_script_test.sh REPOSITORY
set -u
repository=$1
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
passed=0 failed=0
fail() { printf 'FAILED: %s\n' "$*"; failed=$((failed + 1)); }
is() { if [[ "$2" == "$3" ]]; then passed=$((passed + 1)); else fail "$1: '$2', not '$3'"; fi; }
has() { if grep -qE -e "$2" "$3"; then passed=$((passed + 1)); else fail "$1: no '$2' in: $(head -c 1500 "$3")"; fi; }

# --- the folder ---
bundle=$work/bundle
mkdir -p "$bundle/bin" "$bundle/models/stories260K"
cp "$repository/tests/gpu.sh" "$repository/tests/bench/speed_table.py" "$repository/tests/bench/peer_torch.py" "$bundle/"
# shellcheck disable=SC2016
echo 'export PATH="$(dirname "${BASH_SOURCE[0]}")/bin:$PATH"' >"$bundle/env.sh"
cat >"$bundle/bin/fake" <<'FAKE'
#!/usr/bin/env bash
# Any program of a bundle. PRETEND is what one of them does: "NAME HOW".
name=${0##*/} save=''
[[ "${2-}" != latency ]] || name=latency
[[ "${PRETEND%% *}" != "$name" ]] || how=${PRETEND#* }
case ${how-} in
  fail) echo "trireme: what $name lacks (and why)" >&2; exit 1 ;;
  skip) printf '[  PASSED  ] 0 tests.\n[  SKIPPED ] 3 tests\n'; exit 0 ;;
  silent) exit 0 ;;
  hang) sleep 300 & echo $! >"$PIDS"; wait ;;
  stuck) trap '' INT TERM; sleep 300 & echo $! >"$PIDS"; while :; do sleep 1; done ;;
esac
case $name in
  nvidia-smi) for ((i = 0; i < ${GPUS:-1}; ++i)); do echo "Fake 100, 1.\"2"; done ;;
  # Ranks in a process group of their own.
  mpirun) shift 2; set -m; "$@" & wait $! ;;
  compute-sanitizer) while [[ $1 != */* ]]; do shift; done; "$@" ;;
  python3) [[ $1 != -c && $1 != */peer_torch.py ]] || exit 1; PATH=${PATH#*:} exec python3 "$@" ;;
  trireme_faults) printf 'trireme: rank 1 died\ntrireme: rank 1 is stuck\n' >&2; exit 1 ;;
  *_test) printf '[==========] Running 3 tests\n[  PASSED  ] 3 tests.\n' ;;
  *)
    [[ $1 != make-checkpoint ]] || { mkdir "${!#}"; echo "${!#}" >>"$MADE"; }
    while (($#)); do
      case $1 in
        --save | --metrics) save=$2 ;;
        --benchmark_out=*) save=${1#*=} ;;
      esac
      shift
    done
    echo '{"text": "a story","timings": 1}'
    echo 'trireme: sums over peer memory up to 1 KiB' >&2
    [[ -z $save ]] || echo '{"decode_step_ms": {"p50": 2}}' >"$save"
    [[ $save != *.prom ]] || echo 'trireme_graph_steps_total 5' >"$save"
    ;;
esac
FAKE
chmod +x "$bundle/bin/fake"
programs=(gpu_primitives_test gpu_peer_sum_test elementwise_test matmul_test matmul_e4m3_test rope_test attention_test
  sampling_test mol_test decoder_test golden_test graph_replay_test trireme trireme_faults op_bench gpu_sum_bench comm_bench mpirun compute-sanitizer nvidia-smi python3)
for name in "${programs[@]}"; do ln -s fake "$bundle/bin/$name"; done

# gpu STATUS PRETEND ARGUMENT...: its output in $work/out; RESULTS is $results.
results="$work/the results"
gpu() {
  local status=$1 pretend=$2
  shift 2
  rm -rf "$results"
  PRETEND=$pretend PIDS=$work/pid MADE=$work/made "$bundle/gpu.sh" "$@" >"$work/out" 2>&1
  is "gpu.sh $* ($pretend)" $? "$status"
}
names() { grep -oE '"name": "[^"]*"' "$results/tests.json" | sort; }
json_is_whole() {
  # Without python3 there is nothing that could say.
  if ! command -v python3 >/dev/null || python3 -m json.tool "$results/tests.json" >"$work/json"; then passed=$((passed + 1)); else fail "$1: tests.json"; fi
}
# Some containers leave the dead unburied.
gone() { if grep -qsv ' Z ' "/proc/$(cat "$work/pid")/stat"; then fail "$1: a process is left"; else passed=$((passed + 1)); fi; }
weights_are_gone() {
  local path
  while read -r path; do [[ ! -e "$path" ]] || fail "$1: $path is left"; done <"$work/made"
  is "$1: weights were made" "$(grep -c llama-3.2-1b "$work/made")" "$((++made))"
}
made=0

# --- gpu.sh ---
gpu 2 '' ; has 'no RESULTS' 'RESULTS is missing' "$work/out"
gpu 2 'nvidia-smi fail' "$results" ops benhc; has 'a part' 'unknown part benhc; there are ops models' "$work/out"
gpu 2 '' --time-limit soon "$results"; has 'a limit' "--time-limit takes seconds, not 'soon'" "$work/out"
gpu 2 '' --tme 3 "$results"; has 'an option' 'unknown option --tme' "$work/out"

# All that a run does, and the same names where nothing runs.
GPUS=2 gpu 0 '' "$results"
json_is_whole 'all'
names >"$work/names"
has 'two GPUs' '"sums_auto", "result": "passed"' "$results/tests.json"
has 'sums between GPUs' '"comm_bench", "result": "passed"' "$results/tests.json"
has 'twins' '"graphs_equal_eager", "result": "passed"' "$results/tests.json"
has 'checked' '"racecheck_rope", "result": "passed"' "$results/tests.json"
has 'the peer' '"peer-llama-3.2-1b", "result": "not run: no torch' "$results/tests.json"
weights_are_gone 'all'
gpu 0 'nvidia-smi fail' "$results"
has 'no GPU' 'SKIPPED: .*no GPU \(nvidia-smi: failed \(1\): trireme: what' "$work/out"
is 'no GPU: names' "$(names)" "$(cat "$work/names")"
is 'no GPU: nothing ran' "$(grep -c passed "$work/out")" 1
has 'no GPU: none' '^0 of [0-9]+ steps passed' "$work/out"
json_is_whole 'no GPU'
gpu 0 '' "$results" nccl
has 'one GPU' '^(sums_auto|nccl_inside_graphs_replayed) +not run: (one GPU, and it wants two|no libnccl)' "$work/out"

gpu 0 '' "$results" bench
has 'sums on one GPU' '^gpu_sum_bench +passed' "$work/out"
has 'one GPU: none between' '^comm_bench +not run: one GPU, and it wants two' "$work/out"
weights_are_gone 'one GPU'

# What is no success.
gpu 1 'rope_test skip' "$results" ops; has 'all skipped' '^rope_test +ran no test' "$work/out"
gpu 1 'rope_test silent' "$results" ops; has 'nothing said' '^rope_test +ran no test' "$work/out"
gpu 1 'rope_test fail' "$results" ops; has 'a cause' '^    trireme: what rope_test lacks' "$work/out"
gpu 1 'trireme fail' "$results" ops models
has 'no device' '^device +failed \(1\)' "$work/out"
has 'no device: cause' '^    trireme: what trireme lacks' "$work/out"
has 'no device: rest' '^rope_test +not run: the device could not be used' "$work/out"
gpu 1 'trireme silent' "$results" graphs
has 'nothing written' '^story_graphs +wrote no story_graphs.prom' "$work/out"
has 'nothing compared' '^graphs_equal_eager +failed' "$work/out"

# Time, a lost GPU, Ctrl-C.
gpu 1 'nvidia-smi hang' --time-limit 1 "$results" ops; gone 'lost GPU'
has 'lost GPU' 'nvidia-smi cut off: time: is the GPU lost' "$work/out"
gpu 1 'golden_test stuck' --time-limit 2 "$results" models; gone 'time'
# On a machine that stalls the step before may be the one.
has 'cut off' '^(golden_np1|device) +cut off: time' "$work/out"
has 'time' '"golden_np2", "result": "not run: (time|the device)' "$results/tests.json"
rm -rf "$results" "$work/pid"
# With job control the script has a process group, which gets the signal as a terminal would send it.
set -m
PRETEND='latency hang' PIDS=$work/pid MADE=$work/made "$bundle/gpu.sh" "$results" bench ops >"$work/out" 2>&1 &
script=$!
set +m
until [[ -s "$work/pid" ]]; do sleep 0.1; done
kill -INT -- -$script
wait $script
is 'Ctrl-C' $? 130
gone 'Ctrl-C'
weights_are_gone 'Ctrl-C'
has 'Ctrl-C' '^llama-3.2-1b-latency +interrupted' "$work/out"
has 'Ctrl-C: rest' '"rope_test", "result": "not run: interrupted"' "$results/tests.json"
json_is_whole 'Ctrl-C'

# --- speed_table.py: of benches that ran, and of one that was cut off ---
if command -v python3 >/dev/null; then
  numbers=$work/numbers
  mkdir "$numbers"
  echo '{"decode_share_of_read_bandwidth": {"p50": 0.75}, "decode_step_ms": {"p50": 2}, "prefill_ms": {"p50": 10}}' >"$numbers/llama-3.2-1b-latency.json"
  echo '{"decode_step_ms": {"p50": 5}}' >"$numbers/llama-3.2-1b-latency-eager.json"
  echo '{"decode_compiled_ms": 3, "prefill_ms": 15}' >"$numbers/peer-llama-3.2-1b.json"
  echo '{"microseconds": {"matmul/o/bf16/1": 6, "matmul/o/bf16/16": 9}}' >"$numbers/peer-matmul.json"
  echo '{"prefill_share_of_matmul": {"p50"' >"$numbers/llama-3.1-8b-prefill-own.json"
  {
    echo '{"benchmarks": ['
    for rows in 1 64 512; do
      printf '{"name": "add_rms_norm/bf16/%d/real_time", "real_time": 10}, ' "$rows"
      printf '{"name": "add_rms_norm_unfused/bf16/%d/real_time", "real_time": %d},\n' "$rows" $((15 + rows))
    done
    echo '{"name": "matmul/o/bf16/1/real_time", "real_time": 3000}, {"name": "matmul/o/bf16/16/real_time", "real_time": 6000},'
    echo '{"name": "attention_gqa8/bf16/1/8192/64/128/real_time", "real_time": 10, "%read": 85}]}'
  } >"$numbers/op_bench.json"
  "$bundle/speed_table.py" "$numbers" >"$work/out" 2>&1
  is 'speed_table.py' $? 0
  has 'a share' '^decode, llama-3.2-1b bf16, batch 1.* 0.75 +at least 0.65, aim 0.85' "$work/out"
  has 'a share of an op' '^decode attention.* 0.85 +at least' "$work/out"
  has 'graphs' '^graphs against eager.* 2.50 ' "$work/out"
  has 'the least of several' '^fused against unfused: norm.* 1.60 ' "$work/out"
  has 'cuBLAS' '^matmuls of 1 to 16 rows.* 1.50 ' "$work/out"
  has 'a peer' '^PyTorch, llama-3.2-1b, decode.* 1.50 ' "$work/out"
  has 'cut off' '^prefill, llama-3.1-8b bf16, 8192 tokens  .*not measured' "$work/out"
  has 'no number' '"measured": null' "$numbers/speed.json"
fi

# --- bundle.sh: what it refuses before it builds ---
bundle() {  # STATUS 'regex of its one line' ARGUMENT...
  local status=$1 pattern=$2
  shift 2
  (cd "$work" && "$repository/launch/bundle.sh" "$@" >"$work/out" 2>&1 </dev/null)
  is "bundle.sh $*" $? "$status"
  has "bundle.sh $*" "$pattern" "$work/out"
  is "bundle.sh $*: lines" "$(wc -l <"$work/out")" 1
}
bundle 2 'Which folder'
bundle 2 "^--arch takes .*90a-real.*, not ''" --arch
bundle 2 "^--arch takes .*, not 'banana'" --arch banana to
bundle 2 "^--arch takes .*, not '--no-tests'" --arch --no-tests to
bundle 2 'one folder' to from
bundle 2 'Unknown option --archs' --archs 90a to
bundle 1 '/bundle is not empty' bundle
bundle 1 '/out is a file' out
bundle 1 '/out/to: cannot be made' out/to

printf '%d passed, %d failed\n' "$passed" "$failed"
[[ $failed == 0 ]]
