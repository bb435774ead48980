// One step: what every rank of a replica must know to run one micro-batch (StepPlan), and what
// comes back (StepResult). Made by Scheduler::Next, sent to all ranks, consumed by Worker::Execute,
// taken back by Scheduler::Commit.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/request.h"

namespace trireme {

// What a rank must remember of a sequence from its first chunk to its last.
struct NewSequence {
  int32_t slot = 0;  // index into the ranks' sequence tables; reused when the sequence ends
  int32_t prompt_tokens = 0;  // where the prompt ends and the output begins
  SamplingParams sampling;
};

enum class LogitRows : uint8_t {
  kNone,
  kLast,
  kAll
};  // kLast samples; kAll returns logits, for evaluation

// Tokens [position, position + tokens.size()) of one sequence.
struct Chunk {
  int32_t slot = 0;
  int32_t position = 0;
  LogitRows logit_rows = LogitRows::kNone;
  bool decode = false;  // its one token was sampled by the step before; else it is part of a prompt
  std::vector<TokenId> tokens{};
  std::vector<int32_t> new_pages{};  // appended to the sequence's page table
};

struct StepPlan {
  int64_t step = 0;
  bool stop = false;  // no work: leave the worker loop
  std::vector<NewSequence> new_sequences;
  std::vector<Chunk> chunks;

  bool empty() const { return chunks.empty(); }
  int64_t tokens() const {
    int64_t n = 0;
    for (const Chunk& chunk : chunks) n += static_cast<int64_t>(chunk.tokens.size());
    return n;
  }
};

struct StepResult {
  int64_t step = 0;
  std::vector<SampledToken> sampled{};  // one per chunk with kLast, in plan order
  std::vector<float> logits{};          // [rows of kAll chunks, V], in plan order
  std::string error{};                  // why nothing could be sampled; else empty
};

std::string Serialize(const StepPlan& plan);
StepPlan ParseStepPlan(const std::string& bytes);
std::string Serialize(const StepResult& result);
StepResult ParseStepResult(const std::string& bytes);

}  // namespace trireme
