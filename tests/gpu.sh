#!/usr/bin/env bash
# Runs the GPU tests and benches of a bundle (launch/bundle.sh) on the machine it lies on: FOLDER/gpu.sh RESULTS [part...]
# Parts, in this order when none is named: ops models graphs nccl sanitizer bench peer.
# RESULTS gets a log of each step, tests.json (what ran, how it ended, seconds) and a JSON file of each bench. Every step has a
# time limit; all together end within 8 minutes on an H200. The exit status is 0 when every test passed. Without a GPU it says so and
# runs nothing.
set -uo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
[[ -f "$here/env.sh" ]] || { echo "gpu.sh runs from a bundle: make one with launch/bundle.sh FOLDER" >&2; exit 2; }
# shellcheck source=/dev/null
source "$here/env.sh"
# Where a toolkit is, its tools are found behind what PATH names.
export PATH="$PATH:/usr/local/cuda/bin"
results=${1-}
[[ -n "$results" ]] || { echo "Usage: gpu.sh RESULTS [part...]" >&2; exit 2; }
shift
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 2
parts=("$@")
((${#parts[@]})) || parts=(ops models graphs nccl sanitizer bench peer)
if ! nvidia-smi >"$results/nvidia-smi.txt" 2>&1; then
  echo "SKIPPED: GPU tests and benches ($(IFS=' '; echo "${parts[*]}")): no GPU (nvidia-smi failed)"
  exit 0
fi
chip=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)
echo "GPU: $chip"

steps=()
failed=0
# step NAME LIMIT_S COMMAND...: runs it, its output in NAME.log; a line says how it ended.
step() {
  local name=$1 limit=$2 status begin=$SECONDS how=passed
  shift 2
  timeout -k 5 "$limit" "$@" >"$results/$name.log" 2>&1 </dev/null
  status=$?
  ((status == 0)) || { how="failed ($status)"; failed=1; }
  ((status == 124 || status == 137)) && how="timed out"
  # GoogleTest passes a filter that no test matches.
  grep -qa 'Running 0 tests' "$results/$name.log" && { how="ran nothing"; failed=1; status=1; }
  printf '%-32s %-12s %4d s\n' "$name" "$how" $((SECONDS - begin))
  ((status == 0)) || grep -aE 'FAILED|Failure|error|must be|CHECK' "$results/$name.log" | head -n 8 | sed 's/^/    /'
  steps+=("{\"name\": \"$name\", \"result\": \"$how\", \"seconds\": $((SECONDS - begin))}")
}
missing() { echo "SKIPPED: $1: $2"; steps+=("{\"name\": \"$1\", \"result\": \"skipped: $2\"}"); }

op_tests=(elementwise_test matmul_test matmul_e4m3_test rope_test attention_test sampling_test mol_test)
gpu_only='*/cuda*'

# First what the kernels are made of: where that fails, nothing behind it says more. Op tests read results as soon as an op
# returns, so launches wait; ranks that share a GPU wait for each other, so theirs must not.
run_ops() {
  step gpu_primitives_test 60 "$here/bin/gpu_primitives_test"
  step gpu_peer_sum_test 90 env -u CUDA_LAUNCH_BLOCKING "$here/bin/gpu_peer_sum_test"
  export CUDA_LAUNCH_BLOCKING=1
  local name
  for name in "${op_tests[@]}"; do step "$name" 60 "$here/bin/$name" --gtest_filter="$gpu_only"; done
  step decoder_test 60 "$here/bin/decoder_test" --gtest_filter='*/cuda*'
  unset CUDA_LAUNCH_BLOCKING
}

run_models() {
  export TRIREME_TEST_DEVICE=cuda
  local ranks
  for ranks in 1 2 4; do step "golden_np$ranks" 90 mpirun -np $ranks "$here/bin/golden_test"; done
  unset TRIREME_TEST_DEVICE
  # Whole prompts with cuBLASLt's matmuls.
  step golden_cublaslt 90 env TRIREME_TEST_MATMUL=cublaslt TRIREME_TEST_DEVICE=cuda "$here/bin/golden_test" --gtest_filter='*LogitsInBf16*'
  step story_cublaslt 60 "$here/bin/trireme" generate "$here/models/stories260K" --device cuda --matmul cublaslt --dtype bf16 \
    --prompt "Once upon a time" --max-tokens 60
  step story_tp2_pp2 60 mpirun -np 4 "$here/bin/trireme" generate "$here/models/stories260K" --tp 2 --pp 2 --device cuda \
    --allow-shared-gpu --prompt "Once upon a time" --max-tokens 200
}

# Steps bit by bit, then tokens, by replay and by enqueuing every step anew.
run_graphs() {
  step graph_replay_test 60 "$here/bin/graph_replay_test" --gtest_filter="$gpu_only"
  local how flags=(--device cuda --max-tokens 60 --prompt "Once upon a time" --prompt "One day" --prompt "The cat" --ignore-eos
    --temperature 0.8 --json)
  for how in graphs eager; do
    [[ $how == eager ]] && flags+=(--no-graphs)
    step "story_$how" 60 "$here/bin/trireme" generate "$here/models/stories260K" "${flags[@]}" --metrics "$results/story_$how.prom"
    # Tokens and text; the times differ.
    grep '^{' "$results/story_$how.log" | sed 's/,"timings":.*/}/' | sort >"$results/story_$how.json"
  done
  step graphs_equal_eager 10 cmp "$results/story_graphs.json" "$results/story_eager.json"
  step graphs_replayed 10 grep -E '^trireme_graph_steps_total [1-9]' "$results/story_graphs.prom"
}

run_nccl() {
  if ! python3 -c 'import ctypes; ctypes.CDLL("libnccl.so.2")' 2>/dev/null; then missing nccl "no libnccl.so.2"; return; fi
  step nccl_tp2 90 mpirun -np 2 "$here/bin/trireme" generate "$here/models/stories260K" --tp 2 --device cuda --collectives nccl \
    --allow-shared-gpu --prompt "Once upon a time" --max-tokens 20
  step nccl_pp2 90 mpirun -np 2 "$here/bin/trireme" generate "$here/models/stories260K" --pp 2 --device cuda --collectives nccl \
    --allow-shared-gpu --prompt "Once upon a time" --max-tokens 20
  run_peer_sums
}

# The same tokens whether small sums go over peer memory or through NCCL; the log says up to which size they did.
run_peer_sums() {
  if (($(nvidia-smi -L 2>/dev/null | wc -l) < 2)); then missing peer_sums "one GPU, and they want two"; return; fi
  local how
  for how in auto nccl; do
    step "sums_$how" 90 mpirun -np 2 "$here/bin/trireme" generate "$here/models/stories260K" --tp 2 --device cuda --collectives $how \
      --prompt "Once upon a time" --prompt "One day" --max-tokens 60 --ignore-eos --json
    grep '^{' "$results/sums_$how.log" | sed 's/,"timings":.*/}/' | sort >"$results/sums_$how.json"
  done
  step sums_over_peers_equal_nccl 10 cmp "$results/sums_auto.json" "$results/sums_nccl.json"
  step sums_over_peers_were_there 10 grep -F 'sums over peer memory' "$results/sums_auto.log"
}

run_sanitizer() {
  local tool
  command -v compute-sanitizer >/dev/null || { missing sanitizer "no compute-sanitizer"; return; }
  export CUDA_LAUNCH_BLOCKING=1
  for tool in memcheck racecheck; do
    step "${tool}_attention" 90 compute-sanitizer --tool $tool --error-exitcode 9 "$here/bin/attention_test" \
      --gtest_filter='*SlidingWindowOverSeveral*/cuda_bf16'
    step "${tool}_matmul" 60 compute-sanitizer --tool $tool --error-exitcode 9 "$here/bin/matmul_test" --gtest_filter='*/cuda_bf16'
    step "${tool}_sampling" 60 compute-sanitizer --tool $tool --error-exitcode 9 "$here/bin/sampling_test" --gtest_filter='*/cuda'
  done
  unset CUDA_LAUNCH_BLOCKING
}

run_bench() {
  step op_bench 120 "$here/bin/op_bench" --device cuda --benchmark_min_time=0.05 --benchmark_out="$results/op_bench.json" \
    --benchmark_out_format=json
  local model=$results/.llama-3.2-1b
  step make_1b 60 "$here/bin/trireme" make-checkpoint --like llama-3.2-1b --dtype bf16 "$model"
  step latency_1b 60 "$here/bin/trireme" bench latency "$model" --device cuda --save "$results/llama-3.2-1b-latency.json"
  step latency_1b_eager 60 "$here/bin/trireme" bench latency "$model" --device cuda --no-graphs --save "$results/llama-3.2-1b-latency-eager.json"
  step latency_1b_dependent 60 "$here/bin/trireme" bench latency "$model" --device cuda --dependent-launches --save "$results/llama-3.2-1b-latency-dependent-launches.json"
  step throughput_1b 60 "$here/bin/trireme" bench throughput "$model" --device cuda --save "$results/llama-3.2-1b-throughput.json"
  # The same with a prompt that is nearly all of the work.
  local matmul
  for matmul in own cublaslt; do
    step "prefill_1b_$matmul" 60 "$here/bin/trireme" bench latency "$model" --device cuda --matmul $matmul --input-len 8000 --output-len 2 \
      --max-num-batched-tokens 4096 --save "$results/llama-3.2-1b-prefill-$matmul.json"
  done
  rm -rf "$model"
}

run_peer() {
  if ! python3 -c 'import torch, transformers' 2>/dev/null; then missing peer "no torch and transformers for python3"; return; fi
  step peer_torch 120 python3 "$here/peer_torch.py" --like llama-3.2-1b --save "$results/peer-llama-3.2-1b.json"
}

for part in "${parts[@]}"; do
  case $part in
    ops | models | graphs | nccl | sanitizer | bench | peer) "run_$part" ;;
    *) echo "Unknown part $part." >&2; exit 2 ;;
  esac
done
(
  IFS=,
  printf '{"chip": "%s", "steps": [%s]}\n' "$chip" "${steps[*]}"
) >"$results/tests.json"
exit $failed
