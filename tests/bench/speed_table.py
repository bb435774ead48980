#!/usr/bin/env python3
"""Shares of a GPU's ceilings and ratios, of one run of tests/gpu.sh: speed_table.py RESULTS

Reads the JSON files of the benches in RESULTS, writes RESULTS/speed.json and prints a table. Every share is of a ceiling that
the same bench has measured. "at_least" and "aim" are targets for one H200. What a run has not measured is null.
"""
import json
import os
import sys

ONE, EIGHT = "llama-3.2-1b", "llama-3.1-8b"


class Results:
    def __init__(self, folder):
        self.folder = folder
        self.ops = {}
        for line in self.load("op_bench").get("benchmarks", []):
            self.ops[line["name"].split("/real_time")[0]] = line

    def load(self, name):
        """What a bench has saved; {} where it did not run or was cut off."""
        try:
            with open(os.path.join(self.folder, name + ".json"), encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return {}

    def value(self, name, *keys):
        found = self.load(name)
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def op_share(self, name, counter):
        percent = self.ops.get(name, {}).get(counter)
        return None if percent is None else percent / 100

    def times_fused(self, fused, unfused, rows):
        """How many times as long the unfused ops take; of several row counts the least."""
        found = [ratio(self.ops.get(f"{unfused}/{n}", {}).get("real_time"), self.ops.get(f"{fused}/{n}", {}).get("real_time"))
                 for n in rows]
        return None if None in found else min(found)

    def times_cublas(self):
        """How many times as long cuBLAS takes, called by PyTorch; of the layers and 1 to 16 rows the least."""
        peer = self.value("peer-matmul", "microseconds") or {}
        found = [ratio(1e3 * us, self.ops.get(name, {}).get("real_time")) for name, us in peer.items()]
        return None if None in found else min(found, default=None)


def ratio(over, under):
    return over / under if over and under else None



def table(results):
    """(work, of what, measured, at least, aim)"""
    def decode(name):
        return results.value(name, "decode_share_of_read_bandwidth", "p50")

    def prefill(name):
        return results.value(name, "prefill_share_of_matmul", "p50")

    def step(name):
        return results.value(name, "decode_step_ms", "p50")

    read, matmul, times = "read bandwidth", "matmul rate", "times as fast"
    rows = [
        (f"decode, {EIGHT} bf16, batch 1, context 512", read, decode(f"{EIGHT}-latency"), 0.80, 0.92),
        (f"decode, {ONE} bf16, batch 1, context 512", read, decode(f"{ONE}-latency"), 0.65, 0.85),
        (f"decode, {EIGHT} bf16, batch 64, context 2048", read, decode(f"{EIGHT}-batch64"), 0.70, 0.85),
        ("decode attention, batch 64, context 8192, GQA 8", read,
         results.op_share("attention_gqa8/bf16/1/8192/64/128", "%read"), 0.80, 0.92),
        (f"prefill, {EIGHT} bf16, 8192 tokens", matmul, prefill(f"{EIGHT}-prefill-own"), 0.65, 0.80),
        (f"prefill, {EIGHT} bf16, 8192 tokens, --matmul cublaslt", matmul, prefill(f"{EIGHT}-prefill-cublaslt"), 0.65, 0.80),
        ("prefill attention, causal, 16384 tokens, head_dim 128", matmul,
         results.op_share("attention/bf16/16384/16384/1/128", "%peak"), 0.40, 0.65),
        (f"graphs against eager, {ONE}, batch 1", times,
         ratio(step(f"{ONE}-latency-eager"), step(f"{ONE}-latency")), 1.5, 2.0),
        ("matmuls of 1 to 16 rows against cuBLAS", times, results.times_cublas(), 1.0, 1.0),
        ("fused against unfused: norm", times,
         results.times_fused("add_rms_norm/bf16", "add_rms_norm_unfused/bf16", (1, 64, 512)), 1.3, 2.0),
        ("fused against unfused: RoPE + KV", times,
         results.times_fused("rope_and_store_kv/bf16", "rope_and_store_kv_unfused/bf16", (1, 64, 512)), 1.3, 2.0),
        ("fused against unfused: SwiGLU", times,
         results.times_fused("matmul_swiglu/bf16", "matmul_swiglu_unfused/bf16", (1, 16, 512)), 1.3, 2.0),
    ]
    for model in (ONE, EIGHT):
        peer = f"peer-{model}"
        rows.append((f"PyTorch, {model}, decode, batch 1, context 512", times,
                     ratio(results.value(peer, "decode_compiled_ms"), step(f"{model}-latency")), 1.3, 2.0))
        rows.append((f"PyTorch, {model}, prefill of 512 tokens", times,
                     ratio(results.value(peer, "prefill_ms"), results.value(f"{model}-latency", "prefill_ms", "p50")), 1.3, 2.0))
    return rows


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    rows = table(Results(sys.argv[1]))
    for work, of, measured, at_least, aim in rows:
        shown = "not measured" if measured is None else f"{measured:.2f}"
        print(f"{work:<58} {shown:>12}   at least {at_least:.2f}, aim {aim:.2f}  ({of})")
    with open(os.path.join(sys.argv[1], "speed.json"), "w", encoding="utf-8") as out:
        json.dump({"rows": [dict(zip(("work", "of", "measured", "at_least", "aim"), row)) for row in rows]}, out, indent=2)
        out.write("\n")
    if all(row[2] is None for row in rows):
        print("speed_table.py: none of this has been measured in", sys.argv[1], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
