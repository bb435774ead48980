#!/usr/bin/env python3
"""The same shapes with PyTorch and transformers, for comparison: random weights, bf16, SDPA attention.

peer_torch.py --like llama-3.2-1b [--prompt 512] [--tokens 64] [--save FILE]
peer_torch.py --matmul [--save FILE]
Measures one prefill of the prompt and decode steps at batch 1: eager with a static cache, and the decode step compiled with
CUDA graphs (torch.compile, mode "reduce-overhead"). Prints and saves tokens/s and milliseconds a step.
With --matmul: microseconds of linear layers of llama-3.2-1b for few rows, which are cuBLAS's on a GPU, named as op_bench's.
"""
import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

SHAPES = {
    "llama-3.2-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "llama-3.1-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False),
}


# N, K
LAYERS = {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}
BEYOND_CACHES = 256 << 20


def build(shape, device):
    config = LlamaConfig(**shape, max_position_embeddings=4096, rope_theta=500000.0, attn_implementation="sdpa")
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
    return config, model


def seconds(device, work, repeat):
    """Seconds a call, the best of five runs."""
    best = float("inf")
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeat):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / repeat)
    return best


def captured(device, work):
    """A graph of the work's calls, so that starting them costs nothing; on a CPU the work itself."""
    if device != "cuda":
        return work
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@torch.inference_mode()
def matmuls(device, repeat):
    """Each call has other weights, as many as no cache holds: a model does not read a matrix twice a step."""
    result = {}
    for name, (n, k) in LAYERS.items():
        count = max(1, BEYOND_CACHES // (2 * n * k))
        weights = [torch.rand(n, k, device=device, dtype=torch.bfloat16) for _ in range(count)]
        for rows in (1, 4, 16):
            x = torch.rand(rows, k, device=device, dtype=torch.bfloat16)

            def work():
                for weight in weights:
                    torch.nn.functional.linear(x, weight)

            result[f"matmul/{name}/bf16/{rows}"] = 1e6 * seconds(device, captured(device, work), repeat) / count
        del weights
    return result


def report(result, save):
    print(json.dumps(result, indent=2))
    if save:
        with open(save, "w", encoding="utf-8") as out:
            json.dump(result, out, indent=2)


def chip(device):
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--matmul", action="store_true", help="linear layers instead of a model")
    parser.add_argument("--save")
    args = parser.parse_args()
    if args.matmul:
        report({"peer": f"torch {torch.__version__}", "chip": chip(args.device),
                "microseconds": matmuls(args.device, 20 if args.device == "cuda" else 1)}, args.save)
        return
    config, model = build(SHAPES[args.like], args.device)
    ids = torch.randint(0, config.vocab_size, (1, args.prompt), device=args.device)
    token = ids[:, :1].clone()
    position = torch.tensor([args.prompt], device=args.device)

    def new_cache():
        return StaticCache(config=config, max_batch_size=1, max_cache_len=args.prompt + args.tokens, device=args.device,
                           dtype=torch.bfloat16)

    cache = new_cache()
    positions = torch.arange(args.prompt, device=args.device)

    def prefill():
        model(ids, past_key_values=cache, cache_position=positions, use_cache=True, logits_to_keep=1)

    def decode(forward):
        return forward(token, past_key_values=cache, cache_position=position, use_cache=True).logits

    result = {"peer": f"torch {torch.__version__}", "like": args.like, "prompt": args.prompt,
              "chip": chip(args.device)}
    prefill()
    result["prefill_ms"] = 1e3 * seconds(args.device, prefill, 3)
    decode(model)
    result["decode_eager_ms"] = 1e3 * seconds(args.device, lambda: decode(model), args.tokens)
    if args.device == "cuda":
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=False)
        for _ in range(4):
            decode(compiled)
        result["decode_compiled_ms"] = 1e3 * seconds(args.device, lambda: decode(compiled), args.tokens)
    report(result, args.save)


if __name__ == "__main__":
    main()
