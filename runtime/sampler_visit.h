// One visit of the sampler to the device that has the logits: an upload of what the rows ask, the
// ops, a download of the answers or of what the devices chose from them. Internal to sampler*.cc.
#pragma once

#include <span>
#include <vector>

#include "kernels/token_choice.h"
#include "runtime/sampler.h"
#include "runtime/sampler_row.h"

namespace trireme {

class Sampler::DeviceVisit {
 public:
  // `tp` and `gathered` are those of a visit that chooses, which also has room for kUsualPenalties
  // of each row, however many there are. gathered: room for all shards' answers, of several.
  DeviceVisit(const Visit& visit, Staging* in, Staging* out, int64_t vocab_size,
              Communicator* tp = nullptr, TensorView gathered = {})
      : visit_(visit), in_(in), out_(out), vocab_size_(vocab_size), tp_(tp), gathered_(gathered) {}

  // Uploads what `rows` ask of logits [padded, V], V at most `widest_shard`; the rows behind them
  // ask nothing. The places of questions and answers hang on `padded`, and in a visit that does not
  // choose on the number of penalties, while staging has room.
  absl::Status Ask(Stream& stream, std::span<const RowState> rows, int64_t padded,
                   int64_t widest_shard);
  // Enqueues the answers, and the choice from all shards'. first_id: of the logits' first column.
  void Enqueue(Stream& stream, TensorView logits, int64_t first_id);
  // Waits for what the devices chose, and hands it out; false where they could not tell of a row.
  absl::Status WaitForChosen(Stream& stream);
  bool TakeChosen(std::span<const RowState> rows, std::vector<SampledToken>* sampled);
  // Waits for this shard's answers, and gives each of the rows its own.
  absl::Status WaitForAnswers(Stream& stream);
  void Take(std::span<RowState> rows);

 private:
  struct Summary {
    TensorView inverse_temperature, counts, largest, sum, scores, columns;
    int64_t count = 0;
  };
  bool Raw() const { return visit_.raw_candidates > 0 || visit_.raw_terms; }
  absl::Status Plan(Device& device, int64_t rows, int64_t widest_shard);
  void PlanChoice(int64_t rows, int64_t raw_count);
  Summary PlanSummary(int64_t rows, int64_t count);
  void WriteInputs(std::span<const RowState> rows);
  void WriteChoices(std::span<const RowState> rows);
  void WritePenalties(std::span<const RowState> rows);
  void Summarize(Stream& stream, TensorView logits, const Summary& s);
  void EnqueueChoice(Stream& stream);
  void ReadCandidates(const RowState& row, const Summary& s, int64_t r, std::vector<Candidate>& to);

  const Visit visit_;
  Staging *in_, *out_;
  const int64_t vocab_size_;
  Communicator* tp_;
  TensorView gathered_;
  int64_t penalties_ = 0, places_room_ = 0;
  bool logprobs_ = false;  // a row wants them
  TensorView penalty_count_, places_, amounts_, before_;
  TensorView seeds_, limits_, largest_, keys_, drawn_scores_, drawn_;
  TensorView in_end_;  // behind it are penalties alone
  Summary raw_, scored_;
  // Of the choice.
  TensorView shards_, choices_, filters_, logprobs_wanted_;
  ChosenTokens chosen_;
  TensorView scored_raw_, drawn_raw_, answers_begin_, answers_end_;
};

}  // namespace trireme
