/* The layout of trireme.h as programs have it compiled in: nothing here is ever changed, only added to. A field is appended
 * to its struct, whose size and last lines grow; one that moves, or a value that is given away again, does not compile.
 * Of 64-bit systems, where long and pointers have 8 bytes. */
#include <trireme.h>

#define SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type " has another size")
#define FIELD(type, field, offset, bytes)                                                                  \
  _Static_assert(offsetof(type, field) == (offset) && sizeof(((type*)0)->field) == (bytes), #type "." #field \
                 " has moved, or has another size")
#define VALUE(name, number) _Static_assert((name) == (number), #name " has another value")

VALUE(TRIREME_ABI_VERSION, 3);

SIZE(trireme_engine_options, 128);
FIELD(trireme_engine_options, struct_size, 0, 8);
FIELD(trireme_engine_options, model_dir, 8, 8);
FIELD(trireme_engine_options, tp, 16, 4);
FIELD(trireme_engine_options, pp, 20, 4);
FIELD(trireme_engine_options, dp, 24, 4);
FIELD(trireme_engine_options, device, 32, 8);
FIELD(trireme_engine_options, dtype, 40, 8);
FIELD(trireme_engine_options, threads, 48, 4);
FIELD(trireme_engine_options, max_model_len, 56, 8);
FIELD(trireme_engine_options, max_num_seqs, 64, 8);
FIELD(trireme_engine_options, max_num_batched_tokens, 72, 8);
FIELD(trireme_engine_options, page_size, 80, 8);
FIELD(trireme_engine_options, kv_cache_bytes, 88, 8);
FIELD(trireme_engine_options, max_queue, 96, 8);
FIELD(trireme_engine_options, prefix_cache, 104, 4);
FIELD(trireme_engine_options, graphs, 108, 4);
FIELD(trireme_engine_options, memory_limit, 112, 8);
FIELD(trireme_engine_options, quantization, 120, 8);

SIZE(trireme_request, 128);
FIELD(trireme_request, struct_size, 0, 8);
FIELD(trireme_request, id, 8, 8);
FIELD(trireme_request, prompt_ids, 16, 8);
FIELD(trireme_request, prompt_length, 24, 8);
FIELD(trireme_request, prompt, 32, 8);
FIELD(trireme_request, max_tokens, 40, 8);
FIELD(trireme_request, n, 48, 4);
FIELD(trireme_request, priority, 52, 4);
FIELD(trireme_request, timeout_us, 56, 8);
FIELD(trireme_request, temperature, 64, 4);
FIELD(trireme_request, top_k, 68, 4);
FIELD(trireme_request, top_p, 72, 4);
FIELD(trireme_request, min_p, 76, 4);
FIELD(trireme_request, repetition_penalty, 80, 4);
FIELD(trireme_request, presence_penalty, 84, 4);
FIELD(trireme_request, frequency_penalty, 88, 4);
FIELD(trireme_request, seed, 96, 8);
FIELD(trireme_request, ignore_eos, 104, 4);
FIELD(trireme_request, stop, 112, 8);
FIELD(trireme_request, stop_count, 120, 8);

SIZE(trireme_output, 56);
FIELD(trireme_output, struct_size, 0, 8);
FIELD(trireme_output, request_id, 8, 8);
FIELD(trireme_output, sample, 16, 4);
FIELD(trireme_output, token, 20, 4);
FIELD(trireme_output, text, 24, 8);
FIELD(trireme_output, text_length, 32, 8);
FIELD(trireme_output, finish, 40, 4);
FIELD(trireme_output, error, 48, 8);

SIZE(trireme_stats_data, 112);
FIELD(trireme_stats_data, struct_size, 0, 8);
FIELD(trireme_stats_data, steps, 8, 8);
FIELD(trireme_stats_data, prefill_tokens, 16, 8);
FIELD(trireme_stats_data, decode_tokens, 24, 8);
FIELD(trireme_stats_data, requests, 32, 8);
FIELD(trireme_stats_data, refused, 40, 8);
FIELD(trireme_stats_data, overloaded, 48, 8);
FIELD(trireme_stats_data, preemptions, 56, 8);
FIELD(trireme_stats_data, waiting, 64, 8);
FIELD(trireme_stats_data, running, 72, 8);
FIELD(trireme_stats_data, pages, 80, 8);
FIELD(trireme_stats_data, pages_free, 88, 8);
FIELD(trireme_stats_data, pages_cached, 96, 8);
FIELD(trireme_stats_data, cache_hit_rate, 104, 8);

SIZE(trireme_timeline_data, 80);
FIELD(trireme_timeline_data, struct_size, 0, 8);
FIELD(trireme_timeline_data, request_id, 8, 8);
FIELD(trireme_timeline_data, finish, 16, 4);
FIELD(trireme_timeline_data, prompt_tokens, 24, 8);
FIELD(trireme_timeline_data, output_tokens, 32, 8);
FIELD(trireme_timeline_data, queue_us, 40, 8);
FIELD(trireme_timeline_data, prefill_us, 48, 8);
FIELD(trireme_timeline_data, decode_us, 56, 8);
FIELD(trireme_timeline_data, communication_us, 64, 8);
FIELD(trireme_timeline_data, overhead_us, 72, 8);

SIZE(trireme_code, 4);
VALUE(TRIREME_OK, 0);
VALUE(TRIREME_CANCELLED, 1);
VALUE(TRIREME_UNKNOWN, 2);
VALUE(TRIREME_INVALID_ARGUMENT, 3);
VALUE(TRIREME_DEADLINE_EXCEEDED, 4);
VALUE(TRIREME_NOT_FOUND, 5);
VALUE(TRIREME_ALREADY_EXISTS, 6);
VALUE(TRIREME_RESOURCE_EXHAUSTED, 8);
VALUE(TRIREME_FAILED_PRECONDITION, 9);
VALUE(TRIREME_ABORTED, 10);
VALUE(TRIREME_INTERNAL, 13);
VALUE(TRIREME_UNAVAILABLE, 14);
VALUE(TRIREME_DATA_LOSS, 15);

SIZE(trireme_finish, 4);
VALUE(TRIREME_FINISH_NONE, 0);
VALUE(TRIREME_FINISH_STOP, 1);
VALUE(TRIREME_FINISH_LENGTH, 2);
VALUE(TRIREME_FINISH_CANCELLED, 3);
VALUE(TRIREME_FINISH_DEADLINE, 4);
VALUE(TRIREME_FINISH_ERROR, 5);
