// trireme retrieve: the k best items of every query, by a Mixture-of-Logits head, over all ranks of
// the job. The output is the same for any number of ranks.
#include "launch/retrieve.h"

#include <cstdio>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "kernels/status.h"
#include "launch/command_flags.h"
#include "launch/output_files.h"
#include "launch/session.h"
#include "models/json_file.h"
#include "runtime/retrieval_graphs.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

constexpr int64_t kMaxQueryFile = int64_t{4} << 30;

// One line of a .jsonl file: {"embedding": [...], "user_id": 3, "filter": "...", "exclude_ids":
// []}.
absl::StatusOr<RetrievalQuery> ParseQuery(const std::string& line, const std::string& where) {
  ASSIGN_OR_RETURN(const nlohmann::json object, ParseJsonObject(line, where));
  RetrievalQuery query;
  for (const auto& [key, value] : object.items()) {
    const auto invalid = [&, &key = key](const char* what) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": ", Quoted(key), what));
    };
    const auto all = [&value = value](bool (nlohmann::json::*is)() const noexcept) {
      if (!value.is_array()) return false;
      for (const nlohmann::json& item : value) {
        if (!(item.*is)()) return false;
      }
      return true;
    };
    if (key == "embedding") {
      if (!all(&nlohmann::json::is_number)) return invalid(" must be a list of numbers");
      query.embedding = value.get<std::vector<float>>();
    } else if (key == "user_id") {
      if (!value.is_number_integer()) return invalid(" must be an integer");
      query.user_id = value.get<int64_t>();
    } else if (key == "filter") {
      if (!value.is_string()) return invalid(" must be a string");
      query.filter = value.get<std::string>();
    } else if (key == "exclude_ids") {
      if (!all(&nlohmann::json::is_number_integer)) return invalid(" must be a list of integers");
      query.exclude_ids = value.get<std::vector<int64_t>>();
    } else {
      return invalid(" is no field of a query");
    }
  }
  return query;
}

absl::StatusOr<std::vector<RetrievalQuery>> ReadQueries(const std::string& path) {
  std::vector<RetrievalQuery> queries;
  if (absl::EndsWith(path, ".jsonl")) {
    ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxQueryFile));
    size_t begin = 0, number = 0;
    while (begin < text.size()) {
      const size_t end = std::min(text.find('\n', begin), text.size());
      const std::string line = text.substr(begin, end - begin);
      begin = end + 1;
      ++number;
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      ASSIGN_OR_RETURN(RetrievalQuery query, ParseQuery(line, absl::StrCat(path, ":", number)));
      queries.push_back(std::move(query));
    }
    return queries;
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<EmbeddingFile> file,
                   EmbeddingFile::Open(path, EmbeddingFile::Kind::kQueries));
  queries.resize(file->rows());
  for (int64_t b = 0; b < file->rows(); ++b) {
    queries[b].embedding.resize(file->dim());
    RETURN_IF_ERROR(file->ReadRows(b, 1, queries[b].embedding.data()));
    if (file->has_ids()) RETURN_IF_ERROR(file->ReadIds(b, 1, &queries[b].user_id));
  }
  return queries;
}

// A .npy vector of bool or uint8, one for each row of the items file, as bits.
absl::StatusOr<std::vector<uint32_t>> ReadRowMask(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string bytes, ReadTextFile(path, kMaxQueryFile));
  ASSIGN_OR_RETURN(const NpyHeader header, ParseNpyHeader(bytes, path));
  if ((header.descr != "|b1" && header.descr != "|u1") || header.shape.size() != 1 ||
      header.shape[0] > static_cast<int64_t>(bytes.size()) - header.data_offset) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": must be a vector of bool or uint8, one for each item of the file"));
  }
  std::vector<uint32_t> rows((header.shape[0] + 31) / 32);
  for (int64_t i = 0; i < header.shape[0]; ++i) {
    if (bytes[header.data_offset + i] != 0) rows[i / 32] |= 1u << (i % 32);
  }
  return rows;
}

class Retriever {
 public:
  Retriever(ControlPlane& control, const RetrieveFlags& flags) : control_(control), flags_(flags) {}

  absl::Status Run() {
    ASSIGN_OR_RETURN(options_, ParseRetrievalOptions(flags_.retrieval));
    RETURN_IF_ERROR(control_.Agree(control_.rank() == 0 ? ReadInput() : absl::OkStatus()));
    ASSIGN_OR_RETURN(const std::unique_ptr<RetrievalJob> job,
                     RetrievalJob::Start(control_, flags_.retrieval));
    ASSIGN_OR_RETURN(table_, job->Table(flags_.retrieval));
    RETURN_IF_ERROR(BroadcastInput());
    if (control_.rank() == 0) ReportTable();
    ASSIGN_OR_RETURN(const std::unique_ptr<RetrievalGraphs> graphs, Graphs(job->group()));
    RETURN_IF_ERROR(Search(graphs.get()));
    if (!flags_.save_snapshot.empty()) RETURN_IF_ERROR(table_->SaveSnapshot(flags_.save_snapshot));
    return control_.Agree(control_.rank() == 0 ? Finish() : absl::OkStatus());
  }

 private:
  // Before the table is built: a wrong file should not cost minutes.
  absl::Status ReadInput() {
    const FlightRecorder::Outside outside(control_.recorder());  // a file may be a pipe
    ASSIGN_OR_RETURN(queries_, ReadQueries(flags_.queries));
    for (RetrievalQuery& query : queries_) {
      for (const std::string& filter : flags_.filters) {
        query.filter = query.filter.empty() ? filter : absl::StrCat(query.filter, " & ", filter);
      }
    }
    if (!flags_.filter_rows.empty()) {
      ASSIGN_OR_RETURN(rows_, ReadRowMask(flags_.filter_rows));
    }
    if (!flags_.out.empty() && !absl::EndsWith(flags_.out, ".npy") &&
        !absl::EndsWith(flags_.out, ".jsonl")) {
      return UsageError(absl::StrCat("--out ", flags_.out, ": must end in .npy or .jsonl"));
    }
    return CheckOutputFiles(
        {{"--out", flags_.out}, {"--out", absl::EndsWith(flags_.out, ".npy") ? ScoresPath() : ""}},
        {{"--queries", flags_.queries},
         {"--items", flags_.retrieval.items},
         {"--filter-rows", flags_.filter_rows}},
        flags_.retrieval.model_dir);
  }

  absl::Status BroadcastInput() {
    ByteWriter out;
    out.PutVector(rows_);
    out.Put(static_cast<uint64_t>(queries_.size()));
    for (const RetrievalQuery& query : queries_) {
      out.PutVector(query.embedding);
      out.Put(query.user_id);
      out.PutString(query.filter);
      out.PutVector(query.exclude_ids);
    }
    std::string bytes = out.Take();
    control_.Broadcast(&bytes);
    ByteReader in(bytes);
    rows_ = in.GetVector<uint32_t>();
    queries_.resize(in.Get<uint64_t>());
    for (RetrievalQuery& query : queries_) {
      query.embedding = in.GetVector<float>();
      query.user_id = in.Get<int64_t>();
      query.filter = in.GetString();
      query.exclude_ids = in.GetVector<int64_t>();
    }
    return absl::OkStatus();
  }

  void ReportTable() const {
    if (table_->not_finite() > 0) {
      std::fprintf(
          stderr, "%lld of %lld items hold NaN or infinite values and are never answered\n",
          static_cast<long long>(table_->not_finite()), static_cast<long long>(table_->size()));
    }
  }

  // Worth it where many batches follow: a capture runs its search four times.
  absl::StatusOr<std::unique_ptr<RetrievalGraphs>> Graphs(const RetrievalGroup& group) const {
    constexpr int64_t kManyBatches = 16;
    RetrievalGraphOptions options;
    options.k = options_.k;
    options.modes = {options_.mode};
    options.batches = {std::min(flags_.batch_size, kMaxScanQueries)};
    if (flags_.no_graphs) {
      options.never = EagerReason::kOff;
    } else if (options_.mode == RetrievalMode::kTwoStage || options_.k == 0 ||
               static_cast<int64_t>(queries_.size()) < kManyBatches * options.batches[0]) {
      options.never = EagerReason::kNotCaptured;
    }
    if (control_.rank() == 0) {
      options.warn = [](const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); };
    }
    return RetrievalGraphs::Create(*table_, group, options);
  }

  absl::Status Search(RetrievalGraphs* graphs) {
    RetrievalContext context;
    context.graphs = graphs;
    if (!flags_.filter_rows.empty()) context.rows = &rows_;
    for (size_t first = 0; first < queries_.size(); first += flags_.batch_size) {
      const size_t end = std::min<size_t>(queries_.size(), first + flags_.batch_size);
      const std::vector<RetrievalQuery> batch(queries_.begin() + first, queries_.begin() + end);
      RETURN_IF_ERROR(control_.BeginStep(
          Phase::kSearch, static_cast<int64_t>(first) / flags_.batch_size, /*stage=*/0));
      ASSIGN_OR_RETURN(std::vector<RetrievalAnswer> answers,
                       SearchTable(*table_, batch, options_, context));
      control_.EndStep();
      if (control_.rank() == 0 && !Npy()) output_status_.Update(WriteLines(first, answers));
      for (RetrievalAnswer& answer : answers) {
        failed_ += answer.status.ok() ? 0 : 1;
        if (first_failure_.ok()) first_failure_ = answer.status;
        if (Npy() && control_.rank() == 0) answers_.push_back(std::move(answer));
      }
    }
    return absl::OkStatus();
  }

  bool Npy() const { return absl::EndsWith(flags_.out, ".npy"); }

  absl::Status WriteLines(size_t first, const std::vector<RetrievalAnswer>& answers) {
    std::string text;
    for (size_t i = 0; i < answers.size(); ++i) {
      const RetrievalAnswer& answer = answers[i];
      absl::StrAppend(&text, "{\"query\":", first + i);
      if (!answer.status.ok()) {
        absl::StrAppend(&text,
                        ",\"error\":", nlohmann::json(std::string(answer.status.message())).dump(),
                        "}\n");
        continue;
      }
      absl::StrAppend(&text, ",\"exact\":", answer.exact ? "true" : "false", ",\"ids\":[");
      size_t found = 0;
      while (found < answer.ids.size() && answer.ids[found] >= 0) ++found;
      for (size_t j = 0; j < found; ++j) absl::StrAppend(&text, j == 0 ? "" : ",", answer.ids[j]);
      absl::StrAppend(&text, "],\"scores\":[");
      for (size_t j = 0; j < found; ++j)
        absl::StrAppendFormat(&text, "%s%.9g", j == 0 ? "" : ",", answer.scores[j]);
      absl::StrAppend(&text, "]}\n");
    }
    if (flags_.out.empty()) return WriteOut(control_, text);
    std::ofstream out(flags_.out, first == 0 ? std::ios::trunc : std::ios::app);
    if (out << text << std::flush) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("--out ", flags_.out, ": cannot be written"));
  }

  // Of --out X.npy.
  std::string ScoresPath() const {
    return absl::StrCat(absl::StripSuffix(flags_.out, ".npy"), ".scores.npy");
  }

  // ids [B, k] i64, and beside them scores [B, k] f32; -1 and -inf where there is none.
  absl::Status WriteNpy() const {
    std::ofstream ids(flags_.out, std::ios::binary), scores(ScoresPath(), std::ios::binary);
    const std::vector<int64_t> shape = {static_cast<int64_t>(answers_.size()), options_.k};
    ids << NpyHeaderBytes("<i8", shape);
    scores << NpyHeaderBytes("<f4", shape);
    for (RetrievalAnswer answer : answers_) {
      answer.ids.resize(options_.k, -1);
      answer.scores.resize(options_.k, -std::numeric_limits<float>::infinity());
      ids.write(reinterpret_cast<const char*>(answer.ids.data()), options_.k * 8);
      scores.write(reinterpret_cast<const char*>(answer.scores.data()), options_.k * 4);
    }
    if (ids.flush() && scores.flush()) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("--out ", flags_.out, ": cannot be written"));
  }

  absl::Status Finish() {
    RETURN_IF_ERROR(output_status_);
    if (Npy()) RETURN_IF_ERROR(WriteNpy());
    if (failed_ == 0) return absl::OkStatus();
    return absl::Status(first_failure_.code(),
                        absl::StrCat(failed_, " of ", queries_.size(),
                                     " queries failed; the first: ", first_failure_.message()));
  }

  ControlPlane& control_;
  const RetrieveFlags& flags_;
  RetrievalOptions options_;
  std::unique_ptr<RetrievalTable> table_;
  std::vector<RetrievalQuery> queries_;
  std::vector<uint32_t> rows_;
  std::vector<RetrievalAnswer> answers_;  // of --out X.npy
  absl::Status output_status_, first_failure_;
  int64_t failed_ = 0;
};

}  // namespace

void AddRetrieve(CLI::App& app, RetrieveFlags* flags, JobFlags* job) {
  CLI::App* command = app.add_subcommand(
      "retrieve", "Find the best items of each query with a Mixture-of-Logits head");
  AddRetrievalFlags(command, &flags->retrieval);
  AddJobFlags(command, job);
  command->option_defaults()->group("Queries and answers");
  command
      ->add_option("--queries", flags->queries,
                   "Query embeddings: .npy, .safetensors, or .jsonl with a query a line")
      ->required();
  command
      ->add_option("--filter", flags->filters,
                   "Attributes of answers, e.g. \"en & (news | !sport)\" (repeatable)")
      ->type_size(1)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_option("--filter-rows", flags->filter_rows,
                      "Vector of bool, .npy: which rows of the items may be answered");
  command->add_option("--batch-size", flags->batch_size, "Queries searched together")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{65536}));
  command->add_flag("--no-graphs", flags->no_graphs,
                    "Enqueue every search anew instead of replaying a CUDA graph of it");
  command->add_option("--out", flags->out,
                      "X.jsonl, or X.npy for ids and X.scores.npy (default: JSON lines on stdout)");
  command->add_option("--save-snapshot", flags->save_snapshot,
                      "Folder to save the table to, for --items of later runs");
}

absl::Status RunRetrieve(ControlPlane& control, const RetrieveFlags& flags) {
  return Retriever(control, flags).Run();
}

}  // namespace trireme
