#!/usr/bin/env bash
# trireme retrieve as a user sees it: the golden answers of a converted checkpoint, the same output on any number of
# ranks, snapshots, and one clear line for every bad input.
# Usage: retrieve_test.sh TRIREME MPIEXEC SOURCE_DIR
set -u
mpiexec=$2 source=$3
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
# Names without spaces, wherever the repository lies.
ln -s "$1" "$work/trireme"; trireme=$work/trireme
passed=0 failed=0 limit=60

fail() { printf 'FAILED: %s\n' "$*"; failed=$((failed + 1)); }
# expect STATUS 'extended regex of the output' COMMAND...: also checks that our own words are a single line on failure.
expect() {
  local status=$1 pattern=$2; shift 2
  timeout "$limit" "$@" >"$work/out" 2>"$work/err"; local got=$?
  local lines; lines=$(grep -c '^trireme:' "$work/err")
  if [ "$got" != "$status" ]; then fail "$* : exit status $got, not $status: $(head -c 400 "$work/err")"; return; fi
  if [ -n "$pattern" ] && ! grep -qE -e "$pattern" "$work/err" "$work/out"; then fail "$* : no '$pattern' in: $(head -c 400 "$work/err")"; return; fi
  if [ "$status" != 0 ] && [ "$lines" != 1 ]; then fail "$* : $lines lines of our own, not one"; return; fi
  passed=$((passed + 1))
}
ranks() { printf '%s\n' "$mpiexec -np $1 $trireme"; }
same() { if cmp -s "$1" "$2"; then passed=$((passed + 1)); else fail "$3"; fi; }

if ! python3 -c '' 2>/dev/null; then
  printf 'SKIPPED: trireme retrieve: python3 is missing\n'
  exit 0
fi
# Items and queries out of a golden file; items get attributes "even" and "low" (row below 20).
cat >"$work/files.py" <<'P'
import json, struct, sys
source, out = sys.argv[1:]
raw = open(source, "rb").read()
n = int.from_bytes(raw[:8], "little")
header = json.loads(raw[8:8 + n])
def data(name):
    begin, end = header[name]["data_offsets"]
    return raw[8 + n + begin:8 + n + end]
def write(path, tensors, metadata=None):
    head, offset = ({"__metadata__": metadata} if metadata else {}), 0
    for name, (dtype, shape, blob) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
    text = json.dumps(head).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + b"".join(t[2] for t in tensors.values()))
def npy(path, descr, shape, blob):
    text = str({"descr": descr, "fortran_order": False, "shape": tuple(shape)}).encode() + b"\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + blob)
items, queries = header["input.item_embeddings"]["shape"], header["input.query_embeddings"]["shape"]
words = b"".join(struct.pack("<q", (i % 2 == 0) + 2 * (i < 20)) for i in range(items[0]))
write(out + "/items.safetensors", {"item_embeddings": ("F32", items, data("input.item_embeddings")),
                                   "item_ids": ("I64", items[:1], data("input.item_ids")),
                                   "item_attributes": ("I64", [items[0], 1], words)}, {"attributes": "even,low"})
write(out + "/queries.safetensors", {"query_embeddings": ("F32", queries, data("input.query_embeddings")),
                                     "user_ids": ("I64", queries[:1], data("input.user_ids"))})
npy(out + "/items.npy", "<f4", items, data("input.item_embeddings"))
npy(out + "/queries.npy", "<f4", queries, data("input.query_embeddings"))
npy(out + "/short.npy", "|b1", [3], bytes(3))
npy(out + "/none.npy", "|b1", items[:1], bytes(items[0]))
rows = struct.unpack("<%df" % (queries[0] * queries[1]), data("input.query_embeddings"))
with open(out + "/queries.jsonl", "w") as f:
    for b in range(queries[0]):
        q = {"embedding": list(rows[b * queries[1]:(b + 1) * queries[1]])}
        if b == 1: q["embedding"][2] = 1e999
        if b == 2: q["filter"] = "even & !low"
        f.write(json.dumps(q).replace("Infinity", "1e39") + "\n")
k = header["ref.topk_ids"]["shape"][1]
ids = struct.unpack("<%dq" % (queries[0] * k), data("ref.topk_ids"))
with open(out + "/expected", "w") as f:
    for b in range(queries[0]):
        f.write(",".join(map(str, ids[b * k:(b + 1) * k])) + "\n")
P
python3 "$work/files.py" "$source/tests/golden/mol/tiny_2x2x8.safetensors" "$work"
python3 "$source/tests/golden/mol/make_torch_checkpoint.py" "$source/tests/golden/mol/tiny_2x2x8.safetensors" "$work/tiny.pt"
expect 0 "$work/m" python3 "$source/examples/convert_mol_checkpoint.py" "$work/tiny.pt" "$work/m" --query-nonlinearity geglu
model=$work/m items=$work/items.safetensors queries=$work/queries.safetensors
retrieve() { printf '%s\n' "retrieve --model $model --items $items --queries $queries"; }

# The reference's answers, in every exact mode, on any number of ranks, with ties.
for how in "exact" "pruned" "two-stage --exact-or-certified --each-k 3 --average-k 5"; do
  for n in 1 2 3 4; do
    expect 0 '"exact":true' $(ranks $n) $(retrieve) --k 10 --mode $how
    sed 's/.*"ids":\[\([^]]*\)\].*/\1/' "$work/out" >"$work/ids"
    same "$work/ids" "$work/expected" "golden ids of --mode $how on $n ranks: $(cat "$work/ids")"
    [ "$how $n" = "exact 1" ] && cp "$work/out" "$work/first"
    same "$work/out" "$work/first" "--mode $how on $n ranks prints other bytes than exact on one"
  done
done
expect 0 '"exact":false' "$trireme" $(retrieve) --k 10 --mode two-stage --first-stage average --average-k 12
for storage in bf16 int8; do
  expect 0 '"query":2' "$trireme" $(retrieve) --k 7 --storage $storage; cp "$work/out" "$work/one"
  expect 0 '"query":2' $(ranks 3) $(retrieve) --k 7 --storage $storage --batch-size 1
  same "$work/out" "$work/one" "--storage $storage on three ranks"
done

# Files instead of lines, .npy in, more than there is, nothing asked for.
expect 0 '' $(ranks 2) $(retrieve) --k 10 --out "$work/answers.npy"
[ "$(stat -c %s "$work/answers.npy")" = $((128 + 3 * 10 * 8)) ] && [ "$(stat -c %s "$work/answers.scores.npy")" = $((128 + 3 * 10 * 4)) ] || fail "sizes of answers.npy"
expect 0 '' $(ranks 2) $(retrieve) --k 10 --batch-size 2 --out "$work/answers.jsonl"
same "$work/answers.jsonl" "$work/first" "--out answers.jsonl"
expect 0 '"ids":\[[0-9,]*\]' "$trireme" retrieve --model "$model" --items "$work/items.npy" --queries "$work/queries.npy" --k 60
[ "$(head -n 1 "$work/out" | grep -o '"ids":\[[^]]*\]' | tr ',' '\n' | wc -l)" = 50 ] || fail "k 60 of 50 items"
expect 0 '"ids":\[\]' "$trireme" $(retrieve) --k 0
expect 0 '"ids":\[\]' $(ranks 2) $(retrieve) --filter-rows "$work/none.npy"
expect 0 '"ids":\[[0-9]+,' $(ranks 2) $(retrieve) --filter low --filter '(even | !even)'

# A snapshot of three ranks, read by one and by four.
expect 0 '"query":2' $(ranks 3) $(retrieve) --k 10 --save-snapshot "$work/snapshot"
items=$work/snapshot
for n in 1 4; do
  expect 0 '"query":2' $(ranks $n) $(retrieve) --k 10
  same "$work/out" "$work/first" "the snapshot on $n ranks"
done
printf 'x' | dd of="$(ls "$work"/snapshot/rows-*-00001-of-00003.bin)" bs=1 seek=100 conv=notrunc 2>/dev/null
expect 1 'rows-.*00001-of-00003.bin: is corrupt' $(ranks 2) $(retrieve)
rm "$work"/snapshot/rows-*-00001-of-00003.bin; mkfifo "$(printf '%s' "$work"/snapshot/rows-*-00000-of-00003.bin | sed 's/00000-of/00001-of/')"
expect 1 'rows-.*00001-of-00003.bin: is not a regular file' $(ranks 2) $(retrieve)
rm "$work"/snapshot/rows-*-00001-of-00003.bin
expect 1 'rows-.*00001-of-00003.bin' $(ranks 2) $(retrieve)
items=$work/items.safetensors
# What is there and is no snapshot stays; of one that is, nothing but its own files goes.
mkdir "$work/mine"; echo '{"a": 1}' >"$work/mine/table.json"
expect 1 'table.json: is no snapshot of a retrieval table; a snapshot is not saved over it' $(ranks 2) $(retrieve) --save-snapshot "$work/mine"
[ "$(cat "$work/mine/table.json")" = '{"a": 1}' ] || fail "somebody's table.json was written over"
rm "$work/mine/table.json"; echo x >"$work/mine/rows-of-mine.bin"
expect 0 '' "$trireme" $(retrieve) --save-snapshot "$work/mine"
expect 0 '' $(ranks 2) $(retrieve) --save-snapshot "$work/mine"
[ "$(ls "$work/mine" | tr '\n' ' ')" = 'rows-000002-00000-of-00002.bin rows-000002-00001-of-00002.bin rows-of-mine.bin table.json ' ] || fail "files of a snapshot: $(ls "$work/mine")"
items=$work/mine
expect 1 'a capacity of 9223372036854775807: a table holds at most 4294967295 items' $(ranks 2) $(retrieve) --capacity 9223372036854775807
items=$work/items.safetensors

# A query that fails leaves the others alone.
queries=$work/queries.jsonl
expect 1 '1 of 3 queries failed; the first: the query holds NaN' $(ranks 2) $(retrieve) --k 5
grep -q '"query":1,"error"' "$work/out" && grep -q '"query":2,"exact":true,"ids":\[[0-9]' "$work/out" || fail "answers beside a failed query"
printf '{"embedding": [1, 2, 3]}\n' >"$work/q.jsonl"; queries=$work/q.jsonl
expect 1 'the query has 3 elements; the model.s query_dim is 12' $(ranks 2) $(retrieve)
printf '{"embeding": [1]}\n' >"$work/q.jsonl"
expect 1 'q.jsonl:1: "embeding" is no field of a query' $(ranks 2) $(retrieve)
printf '{"embedding": ["a"]}\n' >"$work/q.jsonl"
expect 1 'q.jsonl:1: "embedding" must be a list of numbers' "$trireme" $(retrieve)
# A line that is no query, one of another size, an error that quotes bytes that are no UTF-8: one answer each.
{ tail -n 1 "$work/queries.jsonl"; printf '{"embedding": [NaN, 1e999]}\n'; tail -n 1 "$work/queries.jsonl" | sed 's/}$/, "filter": "\xd1\x8f"}/'; } >"$work/q.jsonl"
expect 1 '2 of 3 queries failed; the first: .*q.jsonl:2: is not valid JSON' $(ranks 2) $(retrieve) --k 5
[ "$(grep -c '"error"' "$work/out")" = 2 ] && grep -q '"query":0,"exact":true,"ids":\[[0-9]' "$work/out" || fail "answers beside lines that are no query: $(cat "$work/out")"
expect 1 'queries failed' $(ranks 2) $(retrieve) --k 5 --filter "$(printf '\377')"
# No query at all is an empty answer, and not the one from before.
echo old >"$work/old.jsonl"; : >"$work/q.jsonl"
expect 0 '' $(ranks 2) $(retrieve) --out "$work/old.jsonl"
[ -e "$work/old.jsonl" ] && [ ! -s "$work/old.jsonl" ] || fail "no queries leave $(cat "$work/old.jsonl")"
python3 -c 'print("\x93NUMPY\x01\x00v\x00" + ("{\"descr\": \"<f4\", \"fortran_order\": False, \"shape\": (100000000000000, 0), }").replace("\"", chr(39)).ljust(117), end="\n")' | iconv -f utf-8 -t latin1 >"$work/empty.npy"; queries=$work/empty.npy
expect 1 'empty.npy: ' "$trireme" $(retrieve)
queries=$work/nowhere.npy
expect 1 'nowhere.npy' $(ranks 2) $(retrieve)
queries=$work/queries.safetensors

# A language model and retrieval in one job: its hidden states, of 64 elements, are the queries of a head with as many.
mkdir "$work/lm-head"
python3 - "$work/m" "$work/lm-head" <<'P'
import json, random, struct, sys
source, out = sys.argv[1:]
config = json.load(open(source + "/config.json"))
raw = open(source + "/model.safetensors", "rb").read()
n = int.from_bytes(raw[:8], "little")
header, tensors = json.loads(raw[8:8 + n]), {}
random.seed(1)
for name, t in header.items():
    if name == "__metadata__": continue
    begin, end = t["data_offsets"]
    shape, data = t["shape"], raw[8 + n + begin:8 + n + end]
    query = name in ("_query_embeddings_fn._query_emb_proj_module.1._w", "_gating_fn._query_only_partial_module.0.weight")
    if query:
        shape = [64 if x == config["query_dim"] else x for x in shape]
        data = struct.pack("<%df" % (shape[0] * shape[1]), *(random.gauss(0, 0.1) for _ in range(shape[0] * shape[1])))
    tensors[name] = (shape, data)
config["query_dim"] = 64
head, offset = {}, 0
for name, (shape, data) in tensors.items():
    head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + len(data)]}
    offset += len(data)
text = json.dumps(head).encode()
with open(out + "/model.safetensors", "wb") as f:
    f.write(len(text).to_bytes(8, "little") + text + b"".join(data for _, data in tensors.values()))
json.dump(config, open(out + "/config.json", "w"))
P
printf 'Once upon a time\nTom had a dog\nThe sun\n' >"$work/prompts.txt"
ln -s "$source/examples/models/stories260K" "$work/lm"
embed="retrieve --model $work/lm-head --items $items --embedder $work/lm --prompts $work/prompts.txt --dtype f32 --k 3"
expect 0 '"query":2,"exact":true,"ids":\[[0-9]' "$trireme" $embed
grep -o '"ids":[^]]*' "$work/out" >"$work/alone"
[ "$(sort -u "$work/alone" | wc -l)" -gt 1 ] || fail "all prompts find the same: $(cat "$work/alone")"
for layout in "2 --tp 2" "2 --pp 2" "4 --tp 2 --pp 2" "3"; do
  expect 0 '"query":2' $(ranks ${layout%% *}) $embed ${layout#[0-9]}
  grep -o '"ids":[^]]*' "$work/out" >"$work/together"
  same "$work/alone" "$work/together" "a language model's queries on $layout ranks"
done
expect 0 '"query":2' "$trireme" $embed --ranks 2 --prompt "A cat"
expect 1 'its hidden states have 64 elements; the retrieval model.s query_dim is 12' $(ranks 2) retrieve --model "$work/m" --items "$items" --embedder "$work/lm" --prompt x
expect 2 'give --prompt TEXT or --prompts FILE' $(ranks 2) retrieve --model "$work/lm-head" --items "$items" --embedder "$work/lm"
expect 2 'are for --embedder MODEL_DIR' $(ranks 2) $(retrieve) --prompt x
expect 2 'give either --queries FILE or --embedder MODEL_DIR' "$trireme" $(retrieve) --embedder "$work/lm"
expect 1 'nothere/config.json' $(ranks 2) retrieve --model "$work/lm-head" --items "$items" --embedder "$work/nothere" --prompt x

# Bad flags and files.
expect 1 'position 7: the table has no attribute "odd"' $(ranks 2) $(retrieve) --filter 'even &odd'
expect 1 'position 7: expected an attribute' "$trireme" $(retrieve) --filter 'even &'
expect 2 'k 5000: must be from 0 to 2048' $(ranks 2) $(retrieve) --k 5000
expect 2 'mode fast: must be' "$trireme" $(retrieve) --mode fast
expect 2 'exact-or-certified' "$trireme" $(retrieve) --exact-or-certified
expect 2 'storage f8' $(ranks 2) $(retrieve) --storage f8
expect 2 'out x.csv' "$trireme" $(retrieve) --out x.csv
expect 1 'filter-rows .*: has 3 flags; the table has 50 rows' $(ranks 2) $(retrieve) --filter-rows "$work/short.npy"
expect 0 '"ids":\[[0-9]+,' "$trireme" $(retrieve) --filter low --filter ' '
expect 1 'out .*nowhere' $(ranks 2) $(retrieve) --out "$work/nowhere/x.npy"
expect 1 'has 50 items; the table.s capacity is 49' $(ranks 2) $(retrieve) --capacity 49
expect 1 'standard output' bash -c "'$trireme' $(retrieve) >/dev/full"
items=$queries
expect 1 'has no tensor "item_embeddings"|items have 12 elements' $(ranks 2) $(retrieve)
items=$work/items.safetensors
rm -rf "$work/b"; cp -r "$model" "$work/b"; sed -i 's/"component_dim": 8/"component_dim": 4/' "$work/b/config.json"; model=$work/b
expect 1 '2.weight": is \[16, 16\]; the config.json beside it needs \[8, 16\]' $(ranks 2) $(retrieve)
sed -i 's/"component_dim": 4/"component_dim": 8/; s/"temperature": [0-9.]*/"temperature": 1e-300/' "$work/b/config.json"
expect 1 'temperature: is 1e-300; must be a number from 1e-30 to 1e30' $(ranks 2) $(retrieve)
sed -i 's/"component_dim"/"component_size"/' "$work/b/config.json"
expect 1 'component_dim: is missing' $(ranks 2) $(retrieve)
head -c 3000 "$work/m/model.safetensors" >"$work/b/model.safetensors"; cp "$work/m/config.json" "$work/b"
expect 1 'b/model.safetensors' $(ranks 2) $(retrieve)
model=$work/m

# The roofline: 20,480 FLOPs and 576 bytes a pair at 8x4x64 (bf16), whatever the machine.
printf '{"name": "paper", "flops": 790e12, "read_bytes_per_s": 4.3e12}' >"$work/hw.json"
rm -rf "$work/head"; "$trireme" make-checkpoint --like mol-8x4x64 "$work/head" >"$work/out"
expect 0 '^8 +MoL, item side cached +1.64e\+12 +5.76e\+09 +284.4 +FLOPs +2.074' "$trireme" analyze mol --model "$work/head" --items 10000000 --hardware "$work/hw.json"
expect 0 '"bound": "bytes"' $(ranks 2) analyze mol --model "$work/head" --batch 1 --json --hardware "$work/hw.json"
# Where exponentials have units of their own, they bind: 193 a pair.
printf '{"flops": 790e12, "read_bytes_per_s": 4.3e12, "special_functions_per_s": 3.7e12}' >"$work/hw3.json"
expect 0 '^8 +MoL, item side cached +1.64e\+12 +5.76e\+09 +284.4 +special +4.173' "$trireme" analyze mol --model "$work/head" --items 10000000 --hardware "$work/hw3.json"
expect 0 '^8x4x64 +32 +bf16 +33.384 +6.000 ' "$trireme" tune mol --hardware "$work/hw3.json" --latency-ms 33.4 --memory-gb 6.1 --items 10000000 --batch 32
expect 1 'hw2.json' "$trireme" analyze mol --model "$work/head" --hardware "$work/hw2.json"
# 32 queries over 10 million items at 8x4x64: 8.3 ms of the paper's FLOPs, 16.6 ms at half its rate.
expect 0 '^8x4x64 +32 +bf16 +16.591 +6.000 ' "$trireme" tune mol --hardware "$work/hw.json" --latency-ms 16.6 --memory-gb 6.1 --items 10000000 --batch 32
expect 0 '"shape": "8x4x64"' "$trireme" tune mol --hardware "$work/hw.json" --latency-ms 16.6 --memory-gb 6.1 --items 80000000 --shards 8 --batch 32 --json
expect 0 'Checked: .* predicted .* measured' "$trireme" tune mol --latency-ms 10000 --memory-gb 0.001 --items 2000 --batch 2
expect 1 'no head fits: the fastest takes' "$trireme" tune mol --hardware "$work/hw.json" --latency-ms 0.001 --memory-gb 1
expect 2 'latency-ms is required' "$trireme" tune mol --memory-gb 1
expect 2 'tune mol runs on one rank' $(ranks 2) tune mol --latency-ms 1 --memory-gb 1
printf '{"flops": -1}' >"$work/hw.json"
expect 1 'hw.json: "flops" must be' "$trireme" analyze mol --model "$work/head" --hardware "$work/hw.json"

# Every mode of the bench runs, on one rank, with a sweep, and on two.
for n in 1 2; do
  sizes=$([ $n = 1 ] && echo 500,700 || echo 500)
  limit=240 expect 0 '"mode": "per-embedding-100"' $(ranks $n) bench mol --shape 2x2x8 --items $sizes --batch 2 --iterations 1 --k 5
  # Of each point all modes with recall, rate and proof, and a dot product of the same items; the eager twin.
  python3 - "$work/out" $n <<'P' || fail "bench mol on $n ranks: $(head -c 400 "$work/out")"
import json, sys
result = json.load(open(sys.argv[1]))
tables = result["tables"]
assert [t["items"] for t in tables] == ([500, 700] if sys.argv[2] == "1" else [500]), tables
for table in tables:
    assert [b["batch"] for b in table["batches"]] == [2], table
    assert table["table_bytes_per_item"] > 0 and ("eager" in table) == (sys.argv[2] == "1")
    for batch in table["batches"]:
        assert batch["dot_product_ms"] > 0
        modes = {m["mode"]: m for m in batch["modes"]}
        assert len(modes) == 7 and {"exact", "pruned", "per-embedding-10"} < set(modes), modes
        assert "share_of_matmul" in modes["exact"]
        for mode in modes.values():
            assert {"ms", "pairs_per_s", "gated_share", "recall", "proven_exact", "merge_us"} < set(mode), mode
        assert modes["exact"]["recall"] == modes["pruned"]["recall"] == 1 and modes["pruned"]["proven_exact"] == 1
P
  passed=$((passed + 1))
done
expect 2 'shape 8x4' "$trireme" bench mol --shape 8x4

# Synthetic heads.
for like in mol-8x4x64 mol-8x8x32; do
  expect 0 "$like" "$trireme" make-checkpoint --like $like "$work/$like"
  expect 1 'is not empty' "$trireme" make-checkpoint --like $like "$work/$like"
done
expect 2 'mol-8x4x128' "$trireme" make-checkpoint --like mol-1x1 "$work/new"
expect 2 'layers' "$trireme" make-checkpoint --like mol-8x8x32 --layers 2 "$work/new"
printf 'no pickle' >"$work/bad.pt"
if python3 "$source/examples/convert_mol_checkpoint.py" "$work/bad.pt" "$work/new" 2>"$work/err" || ! grep -q 'is no checkpoint of torch.save' "$work/err"; then
  fail "convert_mol_checkpoint.py takes a file that is no checkpoint: $(cat "$work/err")"
fi

printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
