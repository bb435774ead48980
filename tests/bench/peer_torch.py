#!/usr/bin/env python3
"""The same shapes with PyTorch and transformers, for comparison: random weights, bf16, SDPA attention.

peer_torch.py --like llama-3.2-1b [--prompt 512] [--tokens 64] [--save FILE]
Measures one prefill of the prompt and decode steps at batch 1: eager with a static cache, and the decode step compiled with
CUDA graphs (torch.compile, mode "reduce-overhead"). Prints and saves tokens/s and milliseconds a step.
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


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save")
    args = parser.parse_args()
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
              "chip": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    prefill()
    result["prefill_ms"] = 1e3 * seconds(args.device, prefill, 3)
    decode(model)
    result["decode_eager_ms"] = 1e3 * seconds(args.device, lambda: decode(model), args.tokens)
    if args.device == "cuda":
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=False)
        for _ in range(4):
            decode(compiled)
        result["decode_compiled_ms"] = 1e3 * seconds(args.device, lambda: decode(compiled), args.tokens)
    print(json.dumps(result, indent=2))
    if args.save:
        with open(args.save, "w", encoding="utf-8") as out:
            json.dump(result, out, indent=2)


if __name__ == "__main__":
    main()
