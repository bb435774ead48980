/* The C interface as a C program sees it: compiled by a C compiler, linked with libtrireme.so, run on several ranks.
 *   c_api_test MODEL_DIR */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <trireme.h>

static int failures = 0;
#define EXPECT(condition)                                                                 \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, trireme_last_error()); \
      ++failures;                                                                         \
    }                                                                                     \
  } while (0)

enum { kMaxTokens = 64 };
typedef struct {
  int32_t tokens[4][kMaxTokens];
  int count[4];
  int ended;
  trireme_finish finish;
  size_t text_bytes;
} answer;

static void take(const trireme_output* output, void* user_data) {
  answer* out = user_data;
  if (output->struct_size != sizeof(*output) || strlen(output->text) != output->text_length) abort();
  if (output->token >= 0) out->tokens[output->sample][out->count[output->sample]++] = output->token;
  out->text_bytes += output->text_length;
  if (output->finish != TRIREME_FINISH_NONE) {
    ++out->ended;
    out->finish = output->finish;
  }
}

typedef struct {
  trireme_engine* engine;
  trireme_code code;
  int said;
} drainer;

static void drain_in_callback(const trireme_output* output, void* user_data) {
  drainer* out = user_data;
  if (output->finish == TRIREME_FINISH_NONE) return;
  out->code = trireme_drain(out->engine);
  out->said = strstr(trireme_last_error(), "a callback would wait for itself") != NULL;
}

static trireme_request ask(uint64_t id, const char* prompt, int64_t max_tokens) {
  trireme_request request;
  trireme_request_init(&request, sizeof(request));
  request.id = id;
  request.prompt = prompt;
  request.max_tokens = max_tokens;
  return request;
}

static void refusals(trireme_engine* engine) {
  answer none = {0};
  trireme_request request = ask(1, "Once", 5);
  request.struct_size = 0;
  EXPECT(trireme_submit(engine, &request, take, &none) == TRIREME_INVALID_ARGUMENT);
  request = ask(1, NULL, 5);
  EXPECT(trireme_submit(engine, &request, take, &none) == TRIREME_INVALID_ARGUMENT);
  request = ask(1, "Once", 0);
  EXPECT(trireme_submit(engine, &request, take, &none) == TRIREME_INVALID_ARGUMENT);
  EXPECT(strstr(trireme_last_error(), "max-tokens is 0") != NULL);
  request = ask(1, "Once", 5);
  request.top_p = 3.0f;
  EXPECT(trireme_submit(engine, &request, take, &none) == TRIREME_INVALID_ARGUMENT);
  request = ask(1, "Once", 5);
  request.timeout_us = -5;
  EXPECT(trireme_submit(engine, &request, take, &none) == TRIREME_INVALID_ARGUMENT);
  EXPECT(strstr(trireme_last_error(), "timeout_us is -5") != NULL);
  request.timeout_us = 0;
  EXPECT(trireme_submit(engine, &request, NULL, NULL) == TRIREME_INVALID_ARGUMENT);
  EXPECT(trireme_submit(NULL, &request, take, &none) == TRIREME_INVALID_ARGUMENT);
  EXPECT(trireme_cancel(engine, 99) == TRIREME_NOT_FOUND);
  EXPECT(trireme_engine_run(engine) == TRIREME_FAILED_PRECONDITION);
  EXPECT(none.ended == 0 && none.count[0] == 0);
}

/* A timeout too long for the clock is none. It used to pass the clock's end and begin again in the past: the request
 * was over at once, as soon as another one had a deadline. */
static void long_timeouts(trireme_engine* engine, answer out[3]) {
  const int64_t timeouts[] = {60 * 1000000, INT64_MAX, INT64_MAX - 1000000000};
  for (int i = 0; i < 3; ++i) {
    trireme_request request = ask(5 + i, "Once upon a time", 20);
    request.timeout_us = timeouts[i];
    EXPECT(trireme_submit(engine, &request, take, &out[i]) == TRIREME_OK);
  }
}

static void answers(trireme_engine* engine) {
  static answer text, ids, samples, stopped, timed[3];
  trireme_request request = ask(1, "Once upon a time", 20);
  EXPECT(trireme_submit(engine, &request, take, &text) == TRIREME_OK);
  int32_t tokens[16];
  size_t count = 2;
  EXPECT(trireme_encode(engine, "Once upon a time", tokens, &count) == TRIREME_INVALID_ARGUMENT);
  EXPECT(count > 2 && count <= 16);
  EXPECT(trireme_encode(engine, "Once upon a time", tokens, &count) == TRIREME_OK);
  request = ask(2, NULL, 20);
  request.prompt_ids = tokens;
  request.prompt_length = count;
  EXPECT(trireme_submit(engine, &request, take, &ids) == TRIREME_OK);
  request = ask(3, "Once upon a time", 8);
  request.n = 4;
  request.temperature = 1.0f;
  EXPECT(trireme_submit(engine, &request, take, &samples) == TRIREME_OK);
  const char* stop[] = {" "};
  request = ask(4, "Once upon a time", 50);
  request.stop = stop;
  request.stop_count = 1;
  EXPECT(trireme_submit(engine, &request, take, &stopped) == TRIREME_OK);
  long_timeouts(engine, timed);
  drainer draining = {engine, TRIREME_OK, 0};
  request = ask(8, "Once upon a time", 1);
  EXPECT(trireme_submit(engine, &request, drain_in_callback, &draining) == TRIREME_OK);
  EXPECT(trireme_drain(engine) == TRIREME_OK);
  EXPECT(draining.code == TRIREME_FAILED_PRECONDITION && draining.said);
  for (int i = 0; i < 3; ++i) EXPECT(timed[i].finish == TRIREME_FINISH_LENGTH && timed[i].count[0] == 20);
  EXPECT(text.ended == 1 && text.count[0] == 20 && text.finish == TRIREME_FINISH_LENGTH);
  EXPECT(text.text_bytes > 20);
  EXPECT(memcmp(text.tokens, ids.tokens, sizeof(text.tokens)) == 0);
  EXPECT(samples.ended == 4 && samples.count[3] == 8);
  EXPECT(memcmp(samples.tokens[0], samples.tokens[1], sizeof(samples.tokens[0])) != 0);
  EXPECT(stopped.finish == TRIREME_FINISH_STOP);
  EXPECT(trireme_submit(engine, &request, take, &stopped) == TRIREME_FAILED_PRECONDITION);
}

static void timelines(const trireme_engine* engine) {
  trireme_timeline_data timeline;
  memset(&timeline, 0, sizeof(timeline));
  EXPECT(trireme_timeline(engine, 1, &timeline) == TRIREME_INVALID_ARGUMENT);
  EXPECT(trireme_timeline(engine, 1, NULL) == TRIREME_INVALID_ARGUMENT);
  timeline.struct_size = sizeof(timeline);
  EXPECT(trireme_timeline(engine, 99, &timeline) == TRIREME_NOT_FOUND);
  EXPECT(trireme_timeline(engine, 1, &timeline) == TRIREME_OK);
  EXPECT(timeline.struct_size == sizeof(timeline) && timeline.request_id == 1);
  EXPECT(timeline.finish == TRIREME_FINISH_LENGTH && timeline.prompt_tokens > 2);
  EXPECT(timeline.output_tokens == 20 && timeline.prefill_us > 0 && timeline.decode_us > 0);
  EXPECT(timeline.queue_us >= 0 && timeline.communication_us >= 0 && timeline.overhead_us >= 0);
  EXPECT(timeline.communication_us <= timeline.prefill_us + timeline.decode_us);
  EXPECT(timeline.overhead_us <= timeline.prefill_us + timeline.decode_us);
  timeline.struct_size = offsetof(trireme_timeline_data, queue_us);
  timeline.queue_us = -7;
  EXPECT(trireme_timeline(engine, 3, &timeline) == TRIREME_OK);
  EXPECT(timeline.output_tokens == 4 * 8 && timeline.queue_us == -7);
}

static void told(trireme_engine* engine) {
  trireme_stats_data stats;
  memset(&stats, 0, sizeof(stats));
  EXPECT(trireme_stats(engine, &stats) == TRIREME_INVALID_ARGUMENT);
  stats.struct_size = sizeof(stats);
  EXPECT(trireme_stats(engine, &stats) == TRIREME_OK);
  EXPECT(stats.requests == 8 && stats.running == 0 && stats.pages_free == stats.pages);
  /* An older caller, whose struct ended after `steps`. */
  stats.struct_size = offsetof(trireme_stats_data, prefill_tokens);
  stats.prefill_tokens = -7;
  EXPECT(trireme_stats(engine, &stats) == TRIREME_OK);
  EXPECT(stats.steps > 0 && stats.prefill_tokens == -7);
  timelines(engine);
  size_t length = 0;
  EXPECT(trireme_metrics(engine, NULL, &length) == TRIREME_INVALID_ARGUMENT);
  char* metrics = malloc(++length);
  EXPECT(trireme_metrics(engine, metrics, &length) == TRIREME_OK);
  EXPECT(strstr(metrics, "trireme_requests_total 8\n") != NULL && strlen(metrics) == length);
  free(metrics);
}

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  EXPECT(trireme_abi_version() == TRIREME_ABI_VERSION);
  EXPECT(strlen(trireme_version()) > 0);
  trireme_session *session, *second;
  if (trireme_session_start(&session) != TRIREME_OK) return 1;
  EXPECT(trireme_session_start(&second) == TRIREME_FAILED_PRECONDITION && second == NULL);
  trireme_engine_options options;
  trireme_engine_options_init(&options, sizeof(options));
  options.threads = 1;
  trireme_engine* engine;
  EXPECT(trireme_engine_open(session, &options, &engine) == TRIREME_INVALID_ARGUMENT);
  options.model_dir = "/nonexistent";
  EXPECT(trireme_engine_open(session, &options, &engine) != TRIREME_OK && engine == NULL);
  EXPECT(strstr(trireme_last_error(), "/nonexistent") != NULL);
  options.model_dir = argv[1];
  options.kv_cache_bytes = 1;
  EXPECT(trireme_engine_open(session, &options, &engine) == TRIREME_INVALID_ARGUMENT);
  EXPECT(strstr(trireme_last_error(), "one page of 16 tokens takes") != NULL);
  options.kv_cache_bytes = 0;
  options.memory_limit = 1000;
  EXPECT(trireme_engine_open(session, &options, &engine) == TRIREME_RESOURCE_EXHAUSTED);
  options.memory_limit = -1;
  EXPECT(trireme_engine_open(session, &options, &engine) == TRIREME_INVALID_ARGUMENT);
  options.memory_limit = 0;
  options.quantization = "int3";
  EXPECT(trireme_engine_open(session, &options, &engine) == TRIREME_INVALID_ARGUMENT);
  EXPECT(strstr(trireme_last_error(), "quantization int3: none, fp8 or fp8-dynamic") != NULL);
  options.quantization = "fp8-dynamic";
  EXPECT(trireme_engine_open(session, &options, &engine) == TRIREME_OK);
  if (!trireme_engine_leads(engine)) EXPECT(trireme_engine_run(engine) == TRIREME_OK);
  trireme_engine_close(engine);
  options.quantization = "none";
  options.kv_cache_bytes = 1 << 20;
  options.max_num_seqs = 8;
  if (trireme_engine_open(session, &options, &engine) != TRIREME_OK) {
    fprintf(stderr, "%s\n", trireme_last_error());
    return 1;
  }
  if (trireme_engine_leads(engine)) {
    refusals(engine);
    answers(engine);
    told(engine);
  } else {
    trireme_request request = ask(1, "Once", 5);
    EXPECT(trireme_submit(engine, &request, take, NULL) == TRIREME_FAILED_PRECONDITION);
    EXPECT(trireme_engine_run(engine) == TRIREME_OK);
  }
  trireme_engine_close(engine);
  trireme_engine_close(NULL);
  trireme_session_end(session);
  return failures == 0 ? 0 : 1;
}
