/* The C interface of Trireme, libtrireme.so: for serving stacks in any language. docs/embedding.md
 * walks through it.
 *
 * The program is started once per device by mpirun or srun, and every rank calls the same functions
 * in the same order: trireme_session_start, trireme_engine_open, and then, on the first rank of a
 * replica (trireme_engine_leads), as many requests as it likes, on the others trireme_engine_run,
 * which returns when the leader closes its engine.
 *
 * ABI: structs begin with struct_size, which the caller sets (the *_init functions do); later
 * versions add fields at the end and take what an older caller does not know as its default. No
 * function throws. Each returns a trireme_code, whose numbers are those of gRPC and Abseil, or a
 * plain value; trireme_last_error() says more. Strings are UTF-8 and, unless a function says
 * otherwise, belong to the library or are copied before it returns.
 *
 * Threads: what a session or engine is opened, run and closed with belongs to one thread;
 * trireme_submit, _cancel, _drain, _stats, _timeline, _metrics and _encode may be called from any,
 * callbacks included, except that _drain would wait for its own callback and returns
 * FAILED_PRECONDITION there.
 */
#ifndef TRIREME_TRIREME_H
#define TRIREME_TRIREME_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Grows with each function or field that is added; a library takes callers of every smaller one.
 * What came after 1 says so. */
#define TRIREME_ABI_VERSION 3

#if defined(__GNUC__)
#define TRIREME_API __attribute__((visibility("default")))
#else
#define TRIREME_API
#endif

typedef enum trireme_code {
  TRIREME_OK = 0,
  TRIREME_CANCELLED = 1,
  TRIREME_UNKNOWN = 2,
  TRIREME_INVALID_ARGUMENT = 3, /* can never work; the error names the limit */
  TRIREME_DEADLINE_EXCEEDED = 4,
  TRIREME_NOT_FOUND = 5, /* no file, or no request of that id */
  TRIREME_ALREADY_EXISTS = 6,
  TRIREME_RESOURCE_EXHAUSTED = 8,  /* overloaded, or out of memory; may work later */
  TRIREME_FAILED_PRECONDITION = 9, /* draining, or called on the wrong rank or in a callback */
  TRIREME_ABORTED = 10,            /* a rank could not do its part: the engine is over */
  TRIREME_INTERNAL = 13,
  TRIREME_UNAVAILABLE = 14,
  TRIREME_DATA_LOSS = 15 /* the request's logits are no numbers */
} trireme_code;

typedef enum trireme_finish {
  TRIREME_FINISH_NONE = 0, /* more will come */
  TRIREME_FINISH_STOP = 1, /* a stop token or string */
  TRIREME_FINISH_LENGTH = 2,
  TRIREME_FINISH_CANCELLED = 3,
  TRIREME_FINISH_DEADLINE = 4,
  TRIREME_FINISH_ERROR = 5
} trireme_finish;

typedef struct trireme_session
    trireme_session; /* the process's place among the ranks; one per process */
typedef struct trireme_engine trireme_engine; /* a model loaded on all ranks */

typedef struct trireme_engine_options {
  size_t struct_size;
  const char* model_dir; /* config.json, *.safetensors, tokenizer.json */
  int32_t tp, pp, dp;    /* their product is the number of ranks; 0: chosen */
  const char* device;    /* "cpu" or "cuda" */
  const char* dtype;     /* "auto", "f32", "bf16" or "f16" */
  int32_t threads;       /* of a rank; 0: cores of the host / ranks on it */
  int64_t max_model_len; /* tokens of prompt and output; 0: the model's */
  int64_t max_num_seqs;  /* samples running at once */
  int64_t max_num_batched_tokens;
  int64_t page_size;      /* tokens */
  int64_t kv_cache_bytes; /* of a rank; 0: room for max_num_seqs of max_model_len, if it fits */
  int64_t max_queue;      /* samples (n a request) beyond max_num_seqs; 0: no limit */
  int32_t prefix_cache;   /* 1: compute equal beginnings of prompts once */
  int32_t graphs;         /* 1: replay decode steps captured at start, where the device can */
  int64_t memory_limit;   /* bytes of a rank in all; what is left over is for the KV cache; 0: nine
                             tenths of the device's memory, unless kv_cache_bytes is given */
  const char* quantization; /* "none", "fp8" (the linear layers' weights in 8 bits) or "fp8-dynamic"
                               (their activations too). Since 3. */
} trireme_engine_options;

typedef struct trireme_request {
  size_t struct_size;
  uint64_t id;               /* the caller's; of one open request at a time */
  const int32_t* prompt_ids; /* token ids, ... */
  size_t prompt_length;
  const char* prompt; /* ... or text, when prompt_ids is null; ends with a zero byte */
  int64_t max_tokens;
  int32_t n;                /* samples; the i-th draws with seed + i */
  int32_t priority;         /* the higher one runs first; who waits catches up */
  int64_t timeout_us;       /* ends the request; 0: none, as is any beyond the clock's end */
  float temperature;        /* 0: greedy */
  int32_t top_k;            /* 0: all */
  float top_p, min_p;       /* 1, 0: all */
  float repetition_penalty; /* 1: off */
  float presence_penalty, frequency_penalty;
  uint64_t seed;
  int32_t ignore_eos;
  const char* const* stop; /* strings that end the output */
  size_t stop_count;
} trireme_request;

/* One token of one sample. The strings are valid during the callback only. */
typedef struct trireme_output {
  size_t struct_size;
  uint64_t request_id;
  int32_t sample;
  int32_t token;    /* -1: an end without a token */
  const char* text; /* what became final with this token; may be empty; ends with a zero byte */
  size_t text_length;
  trireme_finish finish;
  const char* error; /* with TRIREME_FINISH_ERROR: why; else empty */
} trireme_output;

typedef struct trireme_stats_data {
  size_t struct_size;
  int64_t steps, prefill_tokens, decode_tokens;
  int64_t requests, refused, overloaded, preemptions;
  int64_t waiting, running; /* samples */
  int64_t pages, pages_free, pages_cached;
  double cache_hit_rate; /* of the tokens of admitted prompts */
} trireme_stats_data;

/* Where the time of a request went, microseconds: queue, prefill and decode add up to all of it,
 * communication and overhead are parts of the latter two. Since 2. */
typedef struct trireme_timeline_data {
  size_t struct_size;
  uint64_t request_id;
  trireme_finish
      finish; /* of its last sample; TRIREME_FINISH_NONE: not over, and what follows is 0 */
  int64_t prompt_tokens, output_tokens;
  int64_t queue_us;         /* until its first step is planned */
  int64_t prefill_us;       /* from there to the first token */
  int64_t decode_us;        /* and to the end */
  int64_t communication_us; /* between ranks, and waiting for their results */
  int64_t overhead_us;      /* while no step was being executed on this rank */
} trireme_timeline_data;

/* Runs on a thread of the library, for each token in order; delays other callbacks while it runs,
 * but no step. */
typedef void (*trireme_callback)(const trireme_output* output, void* user_data);

TRIREME_API int32_t trireme_abi_version(void);
TRIREME_API const char* trireme_version(void);
/* What went wrong in this thread's last call that did not return TRIREME_OK; valid until its next
 * call. */
TRIREME_API const char* trireme_last_error(void);

/* Joins the other ranks (MPI_Init_thread). Once per process. Collective. */
TRIREME_API trireme_code trireme_session_start(trireme_session** session);
TRIREME_API int32_t trireme_session_rank(const trireme_session* session);
TRIREME_API int32_t trireme_session_size(const trireme_session* session);
/* Leaves them (MPI_Finalize); engines must be closed. Collective. Null is allowed. */
TRIREME_API void trireme_session_end(trireme_session* session);

TRIREME_API void trireme_engine_options_init(trireme_engine_options* options, size_t struct_size);
/* Loads the model on all ranks; fails on all of them when it fails on one. Collective. */
TRIREME_API trireme_code trireme_engine_open(trireme_session* session,
                                             const trireme_engine_options* options,
                                             trireme_engine** engine);
/* 1 on the rank that takes its replica's requests. */
TRIREME_API int32_t trireme_engine_leads(const trireme_engine* engine);
/* On the other ranks: works until the leader closes its engine. */
TRIREME_API trireme_code trireme_engine_run(trireme_engine* engine);
/* Cancels what is open, on the leader. Null is allowed. */
TRIREME_API void trireme_engine_close(trireme_engine* engine);

TRIREME_API void trireme_request_init(trireme_request* request, size_t struct_size);
/* Takes a request, or says why not; never waits. The callback is called from now on until the last
 * output of the last sample; it is not called at all when this does not return TRIREME_OK. */
TRIREME_API trireme_code trireme_submit(trireme_engine* engine, const trireme_request* request,
                                        trireme_callback callback, void* user_data);
TRIREME_API trireme_code trireme_cancel(trireme_engine* engine, uint64_t request_id);
/* Takes no more requests and waits for the open ones. FAILED_PRECONDITION in a callback: nothing
 * happens then. */
TRIREME_API trireme_code trireme_drain(trireme_engine* engine);
TRIREME_API trireme_code trireme_stats(const trireme_engine* engine, trireme_stats_data* stats);
/* Of a request that is open or among the last 1,024 that ended; else NOT_FOUND. `timeline` has its
 * struct_size set. Since 2. */
TRIREME_API trireme_code trireme_timeline(const trireme_engine* engine, uint64_t request_id,
                                          trireme_timeline_data* timeline);
/* Prometheus text. `length` is the buffer's size at first and the text's after; INVALID_ARGUMENT
 * when it is too small. */
TRIREME_API trireme_code trireme_metrics(const trireme_engine* engine, char* buffer,
                                         size_t* length);
/* Token ids of a text. `count` is the room in `ids` at first and the number of ids after. */
TRIREME_API trireme_code trireme_encode(const trireme_engine* engine, const char* text,
                                        int32_t* ids, size_t* count);

#ifdef __cplusplus
}
#endif

#endif /* TRIREME_TRIREME_H */
