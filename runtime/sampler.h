// Chooses the next token of each sequence from logits whose vocabulary is cut over tensor-parallel
// ranks. The shards exchange their best candidates and softmax terms, never the whole vocabulary;
// all ranks come to the same choice.
//
// Drawing uses the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): argmax of logit /
// temperature + noise over the tokens that the filters leave is a draw from the softmax over them.
// The noise is a function of (seed, position, token) alone, so a draw does not depend on the batch,
// the layout, or the order of evaluation. Used by one thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "parallel/communicator.h"
#include "parallel/topology.h"
#include "runtime/request.h"

namespace trireme {

// One row to sample: borrowed from the caller for the call.
struct SampleRow {
  const SamplingParams* params = nullptr;
  std::span<const TokenId>
      tokens;  // prompt and output so far; the token drawn gets position tokens.size()
  int64_t prompt_tokens = 0;
};

class Sampler {
 public:
  // `tp` must outlive the sampler. `vocabulary`: the ids of this rank's logits, of vocab_size in
  // all that PieceOf cuts over the group.
  Sampler(Communicator* tp, Range vocabulary, int64_t vocab_size)
      : tp_(tp),
        vocabulary_(vocabulary),
        widest_shard_(PieceOf(vocab_size, tp->size(), 0).size()) {}

  // logits [R, vocabulary.size()] f32 in host memory; changed by penalties. Collective over the tp
  // group, with the same answer on all its ranks. DataLoss when a row has no finite logit.
  absl::StatusOr<std::vector<SampledToken>> Sample(Stream& stream, TensorView logits,
                                                   std::span<const SampleRow> rows);

  struct Candidate {
    float score = 0.0f;  // after penalties, before temperature
    float raw = 0.0f;    // the model's logit
    int32_t id = -1;     // -1 = no such candidate (the shard has fewer tokens)
  };
  // Softmax terms of a shard: exp is summed relative to the shard's own maximum.
  struct Terms {
    double raw_max, raw_sum, max, sum;
  };
  struct RowState;

 private:
  void Exchange(Stream& stream, std::vector<RowState*>& rows, int64_t candidates,
                int64_t raw_candidates);
  void DrawUnfiltered(Stream& stream, std::vector<RowState*>& rows);

  Communicator* tp_;
  Range vocabulary_;
  int64_t widest_shard_;
  std::vector<char> send_, receive_;
};

}  // namespace trireme
