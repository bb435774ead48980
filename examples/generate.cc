// Generates text on as many ranks as mpirun starts, with the C++ classes:
//   mpirun -n 4 build/cpu/bin/example_generate MODEL_DIR "Once upon a time"
#include <cstdio>

#include "runtime/engine.h"

using namespace trireme;  // NOLINT: an example

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: %s MODEL_DIR PROMPT\n", argv[0]), 2;
  auto control = ControlPlane::Start(&argc, &argv);
  if (!control.ok()) return 1;
  // All ranks in one pipeline; TP, PP and DP multiply to their number.
  const Topology topology{.tp_size = 1, .pp_size = (*control)->size(), .dp_size = 1};
  auto worker = Worker::Load(**control, topology, argv[1], {.max_num_seqs = 1});
  auto tokenizer = Tokenizer::Load(argv[1]);
  const absl::Status loaded = worker.ok() ? tokenizer.status() : worker.status();
  if (!loaded.ok()) {
    if ((*control)->rank() == 0) std::fprintf(stderr, "%s\n", loaded.ToString().c_str());
    return 1;
  }
  if ((*control)->rank() != (*worker)->leader()) return (*worker)->Run().ok() ? 0 : 1;

  const auto engine = Engine::Create(**worker, tokenizer->get());
  Request request;
  request.prompt = (*tokenizer)->Encode(argv[2]).value();
  request.max_tokens = 100;
  const auto stream = (*engine)->Submit(request);
  if (!stream.ok()) {
    std::fprintf(stderr, "%s\n", stream.status().ToString().c_str());
    return 1;  // the engine tells the other ranks to stop when it goes
  }
  while (const auto output = (*stream)->Next()) {
    std::printf("%s", output->text.c_str());
    std::fflush(stdout);
  }
  std::printf("\n(%.1f ms to the first token)\n",
              (*engine)->Timeline(request.id)->prefill_us * 1e-3);
  return 0;
}
