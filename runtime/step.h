// One step: what every rank of a replica must know to run one micro-batch (StepPlan), and what
// comes back (StepResult). Made by Scheduler::Next, sent to all ranks as one message, consumed by
// Worker::Execute, taken back by Scheduler::Commit. Plans are flat arrays, so that one that is used
// again allocates nothing.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "runtime/request.h"

namespace trireme {

// In a chunk: the token that the step before this one samples for the sequence. Its ranks know it
// by then.
inline constexpr TokenId kSampledBefore = -1;

// Where lists of a sequence's tokens and pages have room from the start, and those of a plan's new
// sequences together: longer ones grow by doubling, in the middle of a step.
inline constexpr int64_t kReservedTokens = 1 << 16;

// What a rank must remember of a sequence from its first chunk to its last. A sequence that was
// preempted comes again as a new one.
struct NewSequence {
  int32_t slot = 0;  // index into the ranks' sequence tables; reused when the sequence ends
  int32_t prompt_tokens = 0;    // where the prompt ends and the output begins
  int32_t computed_tokens = 0;  // first tokens whose keys and values are there already
  int32_t num_pages = 0;        // that hold them
  SamplingParams sampling;
};

// The content of page `source` goes to `target`, in all layers, before the step computes anything.
struct PageCopy {
  int32_t source = 0;
  int32_t target = 0;
};

// What is wanted of a chunk's tokens behind the last layer.
enum class LogitRows : uint8_t {
  kNone,
  kLast,    // of the last one logits, which are sampled
  kAll,     // of all the logits themselves, for evaluation
  kHidden,  // of the last one the hidden state behind the final norm; the head is not computed
};

// Tokens [position, position + num_tokens) of one sequence.
struct Chunk {
  int32_t slot = 0;
  int32_t position = 0;
  int32_t num_tokens = 0;
  int32_t page_index = 0;  // the first entry of the sequence's page table that this chunk sets
  int32_t num_pages = 0;   // and how many
  LogitRows logit_rows = LogitRows::kNone;
  bool decode = false;  // its one token was sampled by the step before; else it is part of a prompt
  uint16_t reserved = 0;
};
// They go to the other ranks as they lie in memory: no byte of them is nobody's.
static_assert(std::has_unique_object_representations_v<PageCopy>);
static_assert(std::has_unique_object_representations_v<Chunk>);

// What a plan is made for: as in SchedulerOptions.
struct PlanBounds {
  int64_t max_num_seqs = 0;
  int64_t max_num_batched_tokens = 0;
  int64_t max_model_len = 0;
  int64_t page_size = 1;
};

struct StepPlan {
  int64_t step = 0;
  bool stop = false;  // no work: leave the worker loop
  std::vector<NewSequence> new_sequences;
  std::vector<PageCopy> page_copies;  // in this order
  std::vector<Chunk> chunks;
  // The computed tokens of the new sequences, then the tokens of the chunks; pages likewise.
  std::vector<TokenId> tokens;
  std::vector<int32_t> pages;

  bool empty() const { return chunks.empty(); }
  // Tokens this step computes.
  int64_t num_tokens() const {
    int64_t n = 0;
    for (const Chunk& chunk : chunks) n += chunk.num_tokens;
    return n;
  }
  void Clear();
  // Makes room for a micro-batch in which as many sequences start as may run, with the tokens that
  // they find computed.
  void Reserve(const PlanBounds& bounds);
};

struct StepResult {
  int64_t step = 0;
  // One per chunk with kLast, in plan order; token -1: its logits were no finite numbers.
  std::vector<SampledToken> sampled{};
  std::vector<float> logits{};  // [rows of kAll chunks, V], in plan order
  std::vector<float> hidden{};  // [kHidden chunks, H], in plan order
  std::string error{};          // why nothing could be sampled; else empty

  void Clear();
};

// Of the message of a plan that has just the room that Reserve makes.
size_t ReservedBytes(const PlanBounds& bounds);
// What they write to is replaced, and its memory used again.
void Serialize(const StepPlan& plan, std::string* bytes);
void Parse(const std::string& bytes, StepPlan* plan);
void Serialize(const StepResult& result, std::string* bytes);
void Parse(const std::string& bytes, StepResult* result);

}  // namespace trireme
