// One visit of the sampler to the device that has the logits: an upload of what the rows ask, the
// ops, a download of the answers. Internal to sampler*.cc.
#pragma once

#include <span>

#include "runtime/sampler.h"
#include "runtime/sampler_row.h"

namespace trireme {

// Of staging for a visit: padding of all tensors, rows, penalties, candidates of a row.
int64_t VisitInputBytes(int64_t rows, int64_t penalties);
int64_t VisitOutputBytes(int64_t rows, int64_t penalties, int64_t candidates);

class Sampler::DeviceVisit {
 public:
  // `fixed`: there is room for kUsualPenalties of each row, however many there are.
  DeviceVisit(const Visit& visit, bool fixed, Staging* in, Staging* out)
      : visit_(visit), fixed_(fixed), in_(in), out_(out) {}

  // Uploads what `rows` ask of logits [padded, vocabulary]; the rows behind them ask nothing. The
  // places of questions and answers hang on `padded`, and where they are not fixed on the number of
  // penalties, while staging has room.
  absl::Status Ask(Stream& stream, std::span<const RowState> rows, int64_t padded,
                   int64_t vocabulary);
  // Enqueues the answers. first_id: of the logits' first column.
  void Enqueue(Stream& stream, TensorView logits, int64_t first_id);
  // Waits for the answers.
  absl::Status Wait(Stream& stream);
  // Then gives each of the rows its own.
  void Take(std::span<RowState> rows);

 private:
  struct Summary {
    TensorView inverse_temperature, counts, largest, sum, scores, columns;
    int64_t count = 0;
  };
  bool Raw() const { return visit_.raw_candidates > 0 || visit_.raw_terms; }
  absl::Status Plan(Device& device, int64_t rows, int64_t vocabulary);
  Summary PlanSummary(int64_t rows, int64_t count);
  void WriteInputs(std::span<const RowState> rows);
  void WritePenalties(std::span<const RowState> rows);
  void Summarize(Stream& stream, TensorView logits, const Summary& s);
  void ReadCandidates(const RowState& row, const Summary& s, int64_t r, std::vector<Candidate>& to);

  Visit visit_;
  const bool fixed_;
  Staging *in_, *out_;
  int64_t penalties_ = 0, places_room_ = 0;
  bool logprobs_ = false;  // a row wants them
  TensorView penalty_count_, places_, amounts_, before_;
  TensorView seeds_, limits_, largest_, keys_, drawn_scores_, drawn_;
  TensorView in_end_;  // behind it are penalties alone
  Summary raw_, scored_;
};

}  // namespace trireme
