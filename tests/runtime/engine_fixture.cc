#include "tests/runtime/engine_fixture.h"

#include <gtest/gtest.h>

#include "tests/parallel/world.h"
#include "tests/testing.h"

namespace trireme {

std::vector<Topology> LayoutsOf(int world) {
  std::vector<Topology> out;
  for (int tp = 1; tp <= world; ++tp) {
    if (world % tp == 0 && 8 % tp == 0) out.push_back({tp, world / tp, 1});
  }
  return out;
}

std::string NameOf(const Topology& topology) {
  return "tp " + std::to_string(topology.tp_size) + " pp " + std::to_string(topology.pp_size);
}

void WithWorker(const std::string& model, const Topology& topology, WorkerOptions options,
                const std::function<void(Worker&)>& lead) {
  WithWorkerOf(GoldenModel(model), topology, std::move(options), lead);
}

void WithWorkerOf(const std::string& model_dir, const Topology& topology, WorkerOptions options,
                  const std::function<void(Worker&)>& lead) {
  options.device.threads = 1;
  options.dtype = DType::kF32;
  auto worker = Worker::Load(World(), topology, model_dir, options);
  ASSERT_TRUE(worker.ok()) << worker.status().message();
  if (World().rank() == (*worker)->leader()) {
    lead(**worker);
  } else {
    ASSERT_TRUE((*worker)->Run().ok());
  }
  World().Barrier();
}

std::vector<Request> Workload() {
  std::vector<Request> requests(6);
  for (size_t i = 0; i < requests.size(); ++i) {
    Request& request = requests[i];
    request.id = i;
    for (size_t t = 0; t < 41; ++t)
      request.prompt.push_back(static_cast<TokenId>(3 + 11 * t % 500));
    for (size_t t = 0; t < 1 + 5 * i; ++t)
      request.prompt.push_back(static_cast<TokenId>(3 + (37 * i + 13 * t) % 500));
    request.max_tokens = static_cast<int64_t>(12 + 2 * i);
    SamplingParams& sampling = request.sampling;
    sampling.seed = 100 * i;
    if (i % 2 == 1) sampling.temperature = 0.9f;
    if (i == 3) sampling.top_k = 40, sampling.repetition_penalty = 1.2f;
    if (i == 5) sampling.top_p = 0.9f, sampling.frequency_penalty = 0.3f;
  }
  return requests;
}

Transcript Alone(const std::string& model, int32_t samples) {
  Transcript out;
  WithWorker(model, {1, 1, World().size()}, {}, [&](Worker& worker) {
    if (World().rank() != 0) {
      Engine::Create(worker, nullptr).value();  // goes at once, and tells the others to stop
      return;
    }
    const std::unique_ptr<Engine> engine =
        Engine::Create(worker, nullptr, {.prefix_cache = false, .overlap = false}).value();
    for (const Request& request : Workload()) {
      for (int32_t sample = 0; sample < samples; ++sample) {
        Request one = request;
        one.sampling.seed += static_cast<uint64_t>(sample);
        const auto stream = engine->Submit(one);
        ASSERT_TRUE(stream.ok()) << stream.status().message();
        Tokens& tokens = out[{request.id, sample}];
        while (const auto output = (*stream)->Next()) tokens.push_back(output->sampled.token);
        EXPECT_TRUE(engine->WaitIdle().ok());
      }
    }
  });
  return out;
}

}  // namespace trireme
