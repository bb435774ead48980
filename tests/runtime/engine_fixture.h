// What the engine's tests share: a workload, the tokens it has when every request has the engine to
// itself, and engines in every layout of the test's world.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "runtime/engine.h"

namespace trireme {

using Tokens = std::vector<TokenId>;
// By request and sample.
using Transcript = std::map<std::pair<uint64_t, int32_t>, Tokens>;

// All TP x PP of this many ranks that the golden models can be cut into.
std::vector<Topology> LayoutsOf(int world);
std::string NameOf(const Topology& topology);

// Loads the model on all ranks and runs `lead` on each leader while the other ranks work.
// Collective.
void WithWorker(const std::string& model, const Topology& topology, WorkerOptions options,
                const std::function<void(Worker&)>& lead);

// The same with a checkpoint of the test's own.
void WithWorkerOf(const std::string& model_dir, const Topology& topology, WorkerOptions options,
                  const std::function<void(Worker&)>& lead);

// Six requests whose prompts begin alike, greedy and sampled, with penalties and without.
std::vector<Request> Workload();
// Samples of the workload, each alone on one rank: nothing shared, chunked, overlapped or
// preempted. On rank 0; empty on the others. Collective.
Transcript Alone(const std::string& model, int32_t samples);

}  // namespace trireme
