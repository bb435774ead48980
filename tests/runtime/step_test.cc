// Plans and results as messages between ranks.

#include "runtime/step.h"

#include <gtest/gtest.h>

#include <cstring>

namespace trireme {
namespace {

TEST(StepTest, PlansAndResultsSurviveTheWire) {
  StepPlan plan;
  plan.step = 7;
  plan.new_sequences.push_back({.slot = 3,
                                .prompt_tokens = 5,
                                .computed_tokens = 2,
                                .num_pages = 1,
                                .sampling = {.temperature = 0.5f}});
  plan.page_copies.push_back({.source = 4, .target = 5});
  Chunk chunk;
  chunk.slot = 3;
  chunk.position = 9;
  chunk.num_tokens = 3;
  chunk.page_index = 2;
  chunk.num_pages = 1;
  chunk.logit_rows = LogitRows::kLast;
  chunk.decode = true;
  plan.chunks = {chunk, Chunk()};
  plan.tokens = {8, 9, 1, 2, 3};
  plan.pages = {6, 8};
  std::string bytes, again = "what it held before";
  Serialize(plan, &bytes);
  StepPlan back;
  back.chunks.resize(7);
  back.tokens = {1};
  Parse(bytes, &back);
  Serialize(back, &again);
  EXPECT_EQ(again, bytes);
  EXPECT_EQ(back.tokens, plan.tokens);
  EXPECT_EQ(back.pages, plan.pages);
  EXPECT_EQ(back.page_copies[0].target, 5);
  EXPECT_EQ(back.new_sequences[0].sampling.temperature, 0.5f);
  StepResult result;
  result.step = 7;
  result.sampled.push_back({4, -0.5f, {{4, -0.5f}, {9, -1.0f}}});
  result.logits = {1.0f, 2.0f};
  StepResult result_back{.step = 1, .sampled = std::vector<SampledToken>(5), .logits = {9.0f}};
  Serialize(result, &bytes);
  Parse(bytes, &result_back);
  EXPECT_EQ(result_back.sampled[0].top, result.sampled[0].top);
  EXPECT_EQ(result_back.logits, result.logits);
}

// Objects made in memory that held something else: what lies between their members is not sent.
TEST(StepTest, EqualPlansAreEqualBytes) {
  std::string messages[2];
  for (const int garbage : {0, 0xAB}) {
    StepPlan plan;
    // Room for the elements, and what it held before.
    plan.new_sequences.resize(4);
    plan.chunks.resize(4);
    std::memset(static_cast<void*>(plan.new_sequences.data()), garbage, 4 * sizeof(NewSequence));
    std::memset(static_cast<void*>(plan.chunks.data()), garbage, 4 * sizeof(Chunk));
    for (NewSequence& sequence : plan.new_sequences) {
      sequence.slot = sequence.prompt_tokens = sequence.computed_tokens = sequence.num_pages = 1;
      SamplingParams& sampling = sequence.sampling;
      sampling.temperature = sampling.top_p = sampling.min_p = 0.5f;
      sampling.repetition_penalty = sampling.presence_penalty = sampling.frequency_penalty = 0.5f;
      sampling.top_k = sampling.logprobs = 2;
      sampling.seed = 3;
    }
    for (Chunk& chunk : plan.chunks) {
      chunk.slot = chunk.position = chunk.num_tokens = chunk.page_index = chunk.num_pages = 1;
      chunk.logit_rows = LogitRows::kNone;
      chunk.decode = true;
      chunk.reserved = 0;
    }
    Serialize(plan, &messages[garbage != 0]);
  }
  EXPECT_EQ(messages[0], messages[1]);
}

}  // namespace
}  // namespace trireme
