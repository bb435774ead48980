/* Generates text on as many ranks as mpirun starts, in plain C:
 *   cc generate.c $(pkg-config --cflags --libs trireme) -o generate
 *   mpirun -n 4 ./generate MODEL_DIR "Once upon a time" */
#include <stdio.h>
#include <trireme.h>

static int fail(const char* what) {
  fprintf(stderr, "%s: %s\n", what, trireme_last_error());
  return 1;
}

/* Runs on a thread of the library, once for every token. */
static void print_text(const trireme_output* output, void* user_data) {
  (void)user_data;
  fwrite(output->text, 1, output->text_length, stdout);
  fflush(stdout);
  if (output->finish == TRIREME_FINISH_ERROR) fprintf(stderr, "\n%s\n", output->error);
}

static int lead(trireme_engine* engine, const char* prompt) {
  trireme_request request;
  trireme_request_init(&request, sizeof(request));
  request.id = 1;
  request.prompt = prompt;
  request.max_tokens = 100;
  if (trireme_submit(engine, &request, print_text, NULL) != TRIREME_OK) return fail("submit");
  if (trireme_drain(engine) != TRIREME_OK) return fail("drain");

  trireme_stats_data stats = {.struct_size = sizeof(stats)};
  if (trireme_stats(engine, &stats) != TRIREME_OK) return fail("stats");
  printf("\n(%lld tokens in %lld steps)\n", (long long)stats.decode_tokens + 1, (long long)stats.steps);
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: mpirun -n RANKS %s MODEL_DIR PROMPT\n", argv[0]);
    return 2;
  }
  trireme_session* session;
  if (trireme_session_start(&session) != TRIREME_OK) return fail("session");
  trireme_engine_options options;
  trireme_engine_options_init(&options, sizeof(options));
  options.model_dir = argv[1];
  options.max_num_seqs = 1; /* all the cache for one request */
  trireme_engine* engine;
  int status = 0;
  if (trireme_engine_open(session, &options, &engine) != TRIREME_OK) {
    /* Every rank fails alike; one speaks. */
    status = trireme_session_rank(session) == 0 ? fail(argv[1]) : 1;
  } else if (!trireme_engine_leads(engine)) {
    if (trireme_engine_run(engine) != TRIREME_OK) status = fail("run");
  } else if (trireme_session_rank(session) == 0) {
    status = lead(engine, argv[2]);
  }
  trireme_engine_close(engine);
  trireme_session_end(session);
  return status;
}
