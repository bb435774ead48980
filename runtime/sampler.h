// Chooses the next token of each sequence from logits whose vocabulary is cut over tensor-parallel
// ranks. The device that has the logits boils each row down to its best candidates and softmax
// terms (kernels/sampling.h); the shards exchange those, never the whole vocabulary; the devices
// choose from them (kernels/token_choice.h), all the same. Where a row needs more of its shards
// than what lies ready, the host asks for more and chooses the same way, but for how a GPU rounds
// exp and log in fp64.
//
// Drawing uses the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): argmax of logit /
// temperature + noise over the tokens that the filters leave is a draw from the softmax over them.
// The noise is a function of (seed, position, token) alone, so a draw does not depend on the batch,
// the layout, or the order of evaluation. Used by one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/device.h"
#include "kernels/token_candidates.h"
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

struct ShardView;

class Sampler {
 public:
  // One group twice: `tp` moves the memory that the logits lie in, `host_tp` the host's, and both
  // must outlive the sampler. `vocabulary`: the ids of this rank's logits, of vocab_size in all
  // that PieceOf cuts over the group.
  Sampler(Communicator* tp, Communicator* host_tp, Range vocabulary, int64_t vocab_size);
  ~Sampler();

  // logits [R, vocabulary.size()] f32 on the stream's device; changed by penalties. Collective over
  // the tp group, with the same answer on all its ranks. A row without a finite logit to choose
  // gets token -1 and disturbs no other. ResourceExhausted, on all ranks, when one's device has no
  // room for the candidates. In a steady state nothing is allocated, but for log-probabilities.
  // Before Reserve, or for more rows than were reserved, the host chooses.
  absl::Status Sample(Stream& stream, TensorView logits, std::span<const SampleRow> rows,
                      std::vector<SampledToken>* sampled);

  // Sample in three parts, of which the second is captured behind the logits in a graph. Prepare
  // uploads what `rows` ask of the device, padded to `padded` rows by such as ask nothing, and
  // borrows them until Finish; Enqueue, or its replay, answers it in memory that never moves, for
  // logits [padded, vocabulary.size()], gathers the shards' answers and chooses; Finish waits and
  // hands out what Sample would have. Rows of all kinds go together. Where one asks for more than
  // there is a place for (kCapturedCandidates of a row, kCapturedLogprobs, on average
  // kUsualPenalties), or what was brought is not enough to tell, Finish asks the device anew and
  // chooses itself. REQUIRES: padded is within what was reserved.
  void Prepare(Stream& stream, std::span<const SampleRow> rows, int64_t padded);
  void Enqueue(Stream& stream, TensorView logits);
  absl::Status Finish(Stream& stream, TensorView logits, std::vector<SampledToken>* sampled);
  // What Enqueue writes, for whoever compares it. REQUIRES: prepared.
  ConstTensorView answers() const { return captured_outputs_.all(); }

  // Makes room for so many rows with the usual numbers of candidates and penalties, on the device
  // and for sequences of `tokens` tokens on the host, and tells how much the former is. More takes
  // more when it comes.
  absl::Status Reserve(Device& device, int64_t rows, int64_t tokens);
  static int64_t ReservedBytes(int64_t rows, int64_t ranks);
  int64_t device_bytes() const {
    return inputs_.bytes() + outputs_.bytes() + captured_inputs_.bytes() +
           captured_outputs_.bytes() + (tp_->size() > 1 ? gathered_.view().bytes() : 0);
  }
  // Calls in which the host chose.
  int64_t host_choices() const { return host_choices_; }
  // Spent in the device's ops so far, up to the end of the wait for them; without what Enqueue is
  // called in.
  double op_seconds() const { return op_seconds_; }

  static constexpr int64_t kCapturedCandidates = 64, kCapturedLogprobs = 32;
  // Different tokens with a penalty, of a row on average.
  static constexpr int64_t kUsualPenalties = 128;

  using Candidate = TokenCandidate;
  struct RowState;

 private:
  // Small tensors that go to the device before its work, or come back after it, in one copy.
  class Staging {
   public:
    // to_host: for answers, not for questions.
    explicit Staging(bool to_host) : to_host_(to_host) {}
    // Forgets its tensors and has room for `bytes` of new ones. Allocates now and then.
    absl::Status Reset(Device& device, size_t bytes);
    TensorView Add(DType dtype, Shape shape);
    // Zeros in so many of the first bytes of the host's copies.
    void Clear(size_t bytes);
    // Of the tensors added before `view`, and its first `bytes` bytes.
    size_t BytesUpTo(ConstTensorView view, int64_t bytes) const {
      return static_cast<size_t>(view.as<char>() - base_ + bytes);
    }
    size_t used() const { return arena_.used(); }
    ConstTensorView all() const {
      return {base_, DType::kU8, {static_cast<int64_t>(arena_.used())}};
    }
    int64_t bytes() const { return static_cast<int64_t>(arena_.capacity()); }
    // So many of the first bytes.
    void ToDevice(Stream& stream, size_t bytes);
    void ToHost(Stream& stream, size_t bytes);
    // The host's copy of a tensor from Add.
    template <typename T>
    T* host(ConstTensorView view) {
      return reinterpret_cast<T*>(host_ + (view.as<char>() - base_));
    }

   private:
    const bool to_host_;
    Arena arena_;
    const char* base_ = nullptr;
    // Answers come to memory that the device reaches itself. Questions are written anew while those
    // before them may be on their way.
    Buffer answers_;
    std::vector<char> questions_;
    char* host_ = nullptr;
  };
  // What one visit to the device is to bring.
  struct Visit {
    bool penalize = false;       // first the penalties; the raw candidates are taken before them
    int64_t raw_candidates = 0;  // room for so many of a row that wants log-probabilities
    bool raw_terms = false;
    int64_t candidates = 0;  // room for so many of a row
    bool draw = false;
    // Not the first visit: of all rows as many candidates, and only draws that are to be repeated,
    // with the largest score of all shards.
    bool again = false;
    bool choose = false;  // the devices do, for all shards
  };
  class DeviceVisit;
  static const Visit kUsual;     // what takes no more than this takes no memory either
  static const Visit kCaptured;  // for rows of all kinds
  // The rows of a call, and what their first visit is to bring.
  struct Begun {
    size_t rows = 0;
    Visit visit;
    bool fits = false;      // the captured visit has a place for all; the same on all ranks,
    bool captured = false;  // but for this shard's penalties
  };

  static int64_t VisitInputBytes(int64_t rows, int64_t penalties, int64_t ranks);
  static int64_t VisitOutputBytes(int64_t rows, int64_t penalties, const Visit& visit);
  Begun Begin(std::span<const SampleRow> rows, int64_t padded);
  void AskCaptured(Stream& stream, int64_t padded);
  // From what the first visit brought.
  absl::Status Choose(Stream& stream, TensorView logits, const Begun& begun,
                      std::vector<SampledToken>* sampled);
  // A visit by all ranks, and the exchange and merge of what it brought.
  absl::Status VisitAndMerge(Stream& stream, TensorView logits, std::span<RowState> rows,
                             const Visit& visit);
  absl::Status Exchange(Stream& stream, std::span<RowState> rows, const Visit& visit,
                        const absl::Status& visited);

  Communicator *tp_, *host_tp_;
  Range vocabulary_;
  const int64_t vocab_size_, widest_shard_;
  Staging inputs_{false}, outputs_{true};
  Staging captured_inputs_{false}, captured_outputs_{true};  // do not move once reserved
  Tensor gathered_;  // captured answers of all shards, where there are several
  int64_t reserved_rows_ = 0;
  std::unique_ptr<DeviceVisit> captured_;
  Begun prepared_;
  std::vector<char> send_, receive_;
  std::vector<RowState> states_;   // of as many rows as a call has had
  std::vector<ShardView> shards_;  // of one row, by rank
  double op_seconds_ = 0.0;
  int64_t host_choices_ = 0;
};

}  // namespace trireme
