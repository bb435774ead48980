#include "launch/answer_writer.h"

#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "kernels/status.h"
#include "launch/session.h"
#include "parallel/flight_recorder.h"
#include "runtime/retrieval_source.h"

namespace trireme {
namespace {

// An error may quote what somebody wrote, in any bytes.
std::string JsonString(const absl::Status& status) {
  return nlohmann::json(std::string(status.message()))
      .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void AppendLine(int64_t query, const RetrievalAnswer& answer, std::string* text) {
  absl::StrAppend(text, "{\"query\":", query);
  if (!answer.status.ok()) {
    absl::StrAppend(text, ",\"error\":", JsonString(answer.status), "}\n");
    return;
  }
  absl::StrAppend(text, ",\"exact\":", answer.exact ? "true" : "false", ",\"ids\":[");
  size_t found = 0;
  while (found < answer.ids.size() && answer.ids[found] >= 0) ++found;
  for (size_t j = 0; j < found; ++j) absl::StrAppend(text, j == 0 ? "" : ",", answer.ids[j]);
  absl::StrAppend(text, "],\"scores\":[");
  for (size_t j = 0; j < found; ++j)
    absl::StrAppendFormat(text, "%s%.9g", j == 0 ? "" : ",", answer.scores[j]);
  absl::StrAppend(text, "]}\n");
}

absl::StatusOr<std::unique_ptr<OutputFile>> OpenNpy(const std::string& path,
                                                    const std::string& descr, int64_t queries,
                                                    int64_t k) {
  ASSIGN_OR_RETURN(std::unique_ptr<OutputFile> file, OutputFile::Create(path));
  const std::string header = NpyHeaderBytes(descr, {queries, k});
  RETURN_IF_ERROR(file->Write(header.data(), static_cast<int64_t>(header.size())));
  return file;
}

}  // namespace

std::string ScoresPathOf(const std::string& out) {
  if (!absl::EndsWith(out, ".npy")) return "";
  return absl::StrCat(absl::StripSuffix(out, ".npy"), ".scores.npy");
}

absl::StatusOr<std::unique_ptr<AnswerWriter>> AnswerWriter::Create(ControlPlane& control,
                                                                   const std::string& out,
                                                                   int64_t queries, int64_t k) {
  const FlightRecorder::Outside outside(control.recorder());  // a pipe waits for its reader
  std::unique_ptr<AnswerWriter> writer(new AnswerWriter(control, k));
  if (absl::EndsWith(out, ".npy")) {
    ASSIGN_OR_RETURN(writer->ids_, OpenNpy(out, "<i8", queries, k));
    ASSIGN_OR_RETURN(writer->scores_, OpenNpy(ScoresPathOf(out), "<f4", queries, k));
  } else if (!out.empty()) {
    ASSIGN_OR_RETURN(writer->lines_, OutputFile::Create(out));
  }
  return writer;
}

absl::Status AnswerWriter::Append(const std::vector<RetrievalAnswer>& answers) {
  const absl::Status status = ids_ != nullptr ? AppendRows(answers) : AppendLines(answers);
  next_ += static_cast<int64_t>(answers.size());
  return status;
}

absl::Status AnswerWriter::AppendLines(const std::vector<RetrievalAnswer>& answers) {
  std::string text;
  for (size_t i = 0; i < answers.size(); ++i)
    AppendLine(next_ + static_cast<int64_t>(i), answers[i], &text);
  if (lines_ == nullptr) return WriteOut(control_, text);
  const FlightRecorder::Outside outside(control_.recorder());
  return lines_->Write(text.data(), static_cast<int64_t>(text.size()));
}

absl::Status AnswerWriter::AppendRows(const std::vector<RetrievalAnswer>& answers) {
  const FlightRecorder::Outside outside(control_.recorder());
  for (const RetrievalAnswer& answer : answers) {
    std::vector<int64_t> ids = answer.ids;
    std::vector<float> scores = answer.scores;
    ids.resize(k_, -1);
    scores.resize(k_, -std::numeric_limits<float>::infinity());
    RETURN_IF_ERROR(ids_->Write(ids.data(), k_ * static_cast<int64_t>(sizeof(int64_t))));
    RETURN_IF_ERROR(scores_->Write(scores.data(), k_ * static_cast<int64_t>(sizeof(float))));
  }
  return absl::OkStatus();
}

absl::Status AnswerWriter::Finish() {
  for (const auto& file : {&lines_, &ids_, &scores_}) {
    if (*file != nullptr) RETURN_IF_ERROR((*file)->Finish());
  }
  return absl::OkStatus();
}

}  // namespace trireme
