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
  DeviceVisit(const Visit& visit, Staging* in, Staging* out) : visit_(visit), in_(in), out_(out) {}

  // Uploads what `rows` ask of logits [padded, vocabulary]; the rows behind them ask nothing. The
  // places of questions and answers hang on `padded` and the number of penalties alone, while
  // staging has room.
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
    TensorView inverse_temperature, largest, sum, scores, columns;
    int64_t count = 0;
  };
  bool Raw() const { return visit_.raw_candidates > 0 || visit_.raw_terms; }
  absl::Status Plan(Device& device, int64_t rows, int64_t vocabulary);
  Summary PlanSummary(int64_t rows, int64_t count);
  void WriteInputs(std::span<const RowState> rows);
  void Summarize(Stream& stream, TensorView logits, const Summary& s);
  void ReadCandidates(const RowState& row, const Summary& s, int64_t r, std::vector<Candidate>& to);

  Visit visit_;
  Staging *in_, *out_;
  int64_t penalties_ = 0;
  TensorView places_, amounts_, before_, seeds_, limits_, keys_, drawn_scores_, drawn_;
  Summary raw_, scored_;
};

}  // namespace trireme
