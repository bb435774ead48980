// The hidden states of prompts, in every layout of the world's size: times the head they are the
// logits, and how prompts are packed into steps does not show.

#include "runtime/hidden_states.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "runtime/evaluation.h"
#include "tests/golden_logits.h"
#include "tests/parallel/world.h"
#include "tests/rewritten_checkpoint.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/testing.h"

namespace trireme {
namespace {

// Both run in f32; the head's sums have hundreds of terms.
constexpr double kTolerance = 1e-3;

// [V, H], tied or not.
std::vector<float> HeadOf(const std::string& dir) {
  const bool tied = LoadModelConfig(dir).value().tied_head;
  const std::string name = tied ? "model.embed_tokens.weight" : "lm_head.weight";
  const ScratchDir scratch;
  std::vector<float> head;
  RewriteCheckpoint(dir, scratch.path(), [&](const WeightSpec& spec, std::vector<float>* values) {
    if (spec.name == name) head = *values;
  });
  CHECK(!head.empty());
  return head;
}

WorkerOptions OptionsOf(int64_t sequences, int64_t step_tokens) {
  WorkerOptions options;
  options.dtype = DType::kF32;
  options.max_num_seqs = sequences;
  options.max_num_batched_tokens = step_tokens;
  options.max_logit_rows = std::max(sequences, step_tokens);
  return options;
}

// Beginnings of a golden prompt, of lengths that end within pages and steps, and at their ends.
std::vector<std::vector<TokenId>> Prompts(const std::string& dir) {
  const std::vector<TokenId> ids = ReadGoldenLogits(dir)[0].ids;
  std::vector<std::vector<TokenId>> prompts;
  for (const int64_t length : {5, 1, 16, 17, 2, 9, 3}) {
    const auto most = std::min<int64_t>(length, static_cast<int64_t>(ids.size()));
    prompts.emplace_back(ids.begin(), ids.begin() + most);
  }
  return prompts;
}

std::vector<float> States(Worker& worker, const std::vector<std::vector<TokenId>>& prompts) {
  StepPipeline pipeline(worker);
  std::vector<float> out;
  int64_t next = 0;
  const absl::Status status =
      HiddenStates(worker, pipeline, prompts, [&](int64_t prompt, std::span<const float> hidden) {
        EXPECT_EQ(prompt, next++);
        out.insert(out.end(), hidden.begin(), hidden.end());
      });
  EXPECT_TRUE(status.ok()) << status;
  return out;
}

class HiddenStatesTest : public ::testing::TestWithParam<const char*> {};

TEST_P(HiddenStatesTest, TimesTheHeadTheyAreTheLogits) {
  const std::string dir = GoldenModel(GetParam());
  const ModelConfig config = LoadModelConfig(dir).value();
  const std::vector<std::vector<TokenId>> prompts = Prompts(dir);
  const std::vector<float> head = HeadOf(dir);
  for (const Topology& topology : LayoutsOf(World().size())) {
    if (topology.pp_size > config.num_layers) continue;
    SCOPED_TRACE(NameOf(topology));
    std::vector<float> states;
    WithWorkerOf(dir, topology, OptionsOf(3, 7),
                 [&](Worker& worker) { states = States(worker, prompts); });
    std::vector<float> alone;
    WithWorkerOf(dir, topology, OptionsOf(1, 512),
                 [&](Worker& worker) { alone = States(worker, prompts); });
    EXPECT_EQ(states, alone) << "packed otherwise";
    WithWorkerOf(dir, topology, OptionsOf(1, 512), [&](Worker& worker) {
      StepPipeline pipeline(worker);
      for (size_t p = 0; p < prompts.size(); ++p) {
        std::vector<float> logits;
        ASSERT_TRUE(
            Evaluate(worker, pipeline, prompts[p], [&](int64_t, std::span<const float> row) {
              logits.assign(row.begin(), row.end());
            }).ok());
        const float* hidden = states.data() + p * config.hidden_size;
        for (int64_t v = 0; v < config.vocab_size; ++v) {
          double sum = 0.0;
          for (int64_t h = 0; h < config.hidden_size; ++h)
            sum += static_cast<double>(hidden[h]) * head[v * config.hidden_size + h];
          ASSERT_NEAR(sum, logits[v], kTolerance) << "prompt " << p << ", token " << v;
        }
      }
    });
  }
}

TEST_P(HiddenStatesTest, WhatDoesNotFitIsRefusedBeforeAnythingRuns) {
  const std::string dir = GoldenModel(GetParam());
  if (World().size() > 1) GTEST_SKIP() << "a prompt that does not fit: on one rank";
  WorkerOptions options = OptionsOf(2, 64);
  options.max_model_len = 16;
  WithWorkerOf(dir, Topology{}, options, [&](Worker& worker) {
    StepPipeline pipeline(worker);
    const auto none = [](int64_t, std::span<const float>) { FAIL(); };
    for (const size_t length : {0, 17}) {
      const absl::Status status =
          HiddenStates(worker, pipeline, {{1, 2}, std::vector<TokenId>(length, 1)}, none);
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_NE(std::string(status.message()).find("prompt 2 of 2: has"), std::string::npos);
    }
    EXPECT_TRUE(HiddenStates(worker, pipeline, {}, none).ok());
  });
}

INSTANTIATE_TEST_SUITE_P(Models, HiddenStatesTest,
                         ::testing::Values("stories260K", "tiny-qwen2", "tiny-qwen3",
                                           "tiny-starcoder2"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace trireme
