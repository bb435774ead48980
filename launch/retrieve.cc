// trireme retrieve: the k best items of every query, by a Mixture-of-Logits head, over all ranks of
// the job. The output is the same for any number of ranks.
#include "launch/retrieve.h"

#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "launch/answer_writer.h"
#include "launch/command_flags.h"
#include "launch/output_files.h"
#include "launch/retrieve_queries.h"
#include "launch/session.h"
#include "runtime/retrieval_graphs.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

class Retriever {
 public:
  Retriever(ControlPlane& control, const RetrieveFlags& flags) : control_(control), flags_(flags) {}

  absl::Status Run() {
    ASSIGN_OR_RETURN(options_, ParseRetrievalOptions(flags_.retrieval));
    if (flags_.queries.empty() != Embeds())
      return UsageError("retrieve: give either --queries FILE or --embedder MODEL_DIR");
    if (!Embeds() && !(flags_.embedder.prompts.empty() && flags_.embedder.prompts_file.empty()))
      return UsageError("--prompt, --prompts: are for --embedder MODEL_DIR");
    RETURN_IF_ERROR(control_.Agree(control_.rank() == 0 ? ReadInput() : absl::OkStatus()));
    ASSIGN_OR_RETURN(const std::unique_ptr<RetrievalJob> job,
                     RetrievalJob::Start(control_, flags_.retrieval));
    if (Embeds()) RETURN_IF_ERROR(Embed(job->model().config().query_dim));
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
    if (Embeds()) {
      ASSIGN_OR_RETURN(prompts_, ReadPrompts(flags_.embedder));
      queries_.resize(prompts_.size());
      read_.resize(prompts_.size());
    } else {
      ASSIGN_OR_RETURN(QueryFile file, ReadQueries(flags_.queries));
      queries_ = std::move(file.queries);
      read_ = std::move(file.statuses);
    }
    for (RetrievalQuery& query : queries_) {
      for (const std::string& filter : flags_.filters) {
        if (absl::StripAsciiWhitespace(query.filter).empty()) {
          query.filter = filter;
        } else if (!absl::StripAsciiWhitespace(filter).empty()) {
          query.filter = absl::StrCat(query.filter, " & ", filter);
        }
      }
    }
    if (!flags_.filter_rows.empty()) {
      ASSIGN_OR_RETURN(rows_, ReadRowFlags(flags_.filter_rows));
    }
    if (!flags_.out.empty() && !absl::EndsWith(flags_.out, ".npy") &&
        !absl::EndsWith(flags_.out, ".jsonl")) {
      return UsageError(absl::StrCat("--out ", flags_.out, ": must end in .npy or .jsonl"));
    }
    RETURN_IF_ERROR(CheckOutputFiles({{"--out", flags_.out}, {"--out", ScoresPathOf(flags_.out)}},
                                     {{"--queries", flags_.queries},
                                      {"--prompts", flags_.embedder.prompts_file},
                                      {"--items", flags_.retrieval.items},
                                      {"--filter-rows", flags_.filter_rows}},
                                     flags_.retrieval.model_dir));
    ASSIGN_OR_RETURN(
        writer_, AnswerWriter::Create(control_, flags_.out, static_cast<int64_t>(queries_.size()),
                                      options_.k));
    return absl::OkStatus();
  }

  bool Embeds() const { return !flags_.embedder.model.model_dir.empty(); }

  // Before the table is built: the language model's memory is free by then.
  absl::Status Embed(int64_t query_dim) {
    ModelFlags model = flags_.embedder.model;
    model.device = flags_.retrieval.device;
    model.threads = flags_.retrieval.threads;
    ASSIGN_OR_RETURN(const std::vector<RetrievalQuery> embedded,
                     EmbedPrompts(control_, model, query_dim, prompts_));
    for (size_t i = 0; i < embedded.size(); ++i) queries_[i].embedding = embedded[i].embedding;
    return absl::OkStatus();
  }

  absl::Status BroadcastInput() {
    ByteWriter out;
    out.Put(rows_.count);
    out.PutVector(rows_.bits);
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
    rows_.count = in.Get<int64_t>();
    rows_.bits = in.GetVector<uint32_t>();
    queries_.resize(in.Get<uint64_t>());
    for (RetrievalQuery& query : queries_) {
      query.embedding = in.GetVector<float>();
      query.user_id = in.Get<int64_t>();
      query.filter = in.GetString();
      query.exclude_ids = in.GetVector<int64_t>();
    }
    if (flags_.filter_rows.empty() || rows_.count == table_->rows()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("--filter-rows ", flags_.filter_rows, ": has ",
                                                   rows_.count, " flags; the table has ",
                                                   table_->rows(), " rows"));
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
    options.searches = {options_};
    if (options_.exact_or_certified) {  // what is not proven is searched again
      options.searches.push_back(options_);
      options.searches.back().mode = RetrievalMode::kPruned;
    }
    options.batches = {std::min(flags_.batch_size, kMaxScanQueries)};
    if (flags_.no_graphs) {
      options.never = EagerReason::kOff;
    } else if (options_.k == 0 ||
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
    if (!flags_.filter_rows.empty()) context.rows = &rows_.bits;
    for (size_t first = 0; first < queries_.size(); first += flags_.batch_size) {
      const size_t end = std::min<size_t>(queries_.size(), first + flags_.batch_size);
      const std::vector<RetrievalQuery> batch(queries_.begin() + first, queries_.begin() + end);
      RETURN_IF_ERROR(control_.BeginStep(
          Phase::kSearch, static_cast<int64_t>(first) / flags_.batch_size, /*stage=*/0));
      ASSIGN_OR_RETURN(std::vector<RetrievalAnswer> answers,
                       SearchTable(*table_, batch, options_, context));
      control_.EndStep();
      if (control_.rank() != 0) continue;
      for (size_t i = 0; i < answers.size(); ++i) {
        if (!read_[first + i].ok())
          answers[i] = {.status = read_[first + i], .ids = {}, .scores = {}};
        failed_ += answers[i].status.ok() ? 0 : 1;
        if (first_failure_.ok()) first_failure_ = answers[i].status;
      }
      if (output_status_.ok()) output_status_ = writer_->Append(answers);
    }
    return absl::OkStatus();
  }

  absl::Status Finish() {
    RETURN_IF_ERROR(output_status_);
    RETURN_IF_ERROR(writer_->Finish());
    if (failed_ == 0) return absl::OkStatus();
    return absl::Status(first_failure_.code(),
                        absl::StrCat(failed_, " of ", queries_.size(),
                                     " queries failed; the first: ", first_failure_.message()));
  }

  ControlPlane& control_;
  const RetrieveFlags& flags_;
  RetrievalOptions options_;
  std::unique_ptr<RetrievalTable> table_;
  std::vector<std::vector<TokenId>> prompts_;  // of the embedder, on rank 0
  std::vector<RetrievalQuery> queries_;
  std::vector<absl::Status> read_;  // of each query, on rank 0
  RowFlags rows_;
  std::unique_ptr<AnswerWriter> writer_;  // on rank 0
  absl::Status output_status_, first_failure_;
  int64_t failed_ = 0;
};

}  // namespace

void AddRetrieve(CLI::App& app, RetrieveFlags* flags, JobFlags* job) {
  CLI::App* command = app.add_subcommand(
      "retrieve", "Find the best items of each query with a Mixture-of-Logits head");
  AddRetrievalFlags(command, &flags->retrieval);
  AddJobFlags(command, job);
  AddEmbedderFlags(command, &flags->embedder);
  command->option_defaults()->group("Queries and answers");
  command->add_option("--queries", flags->queries,
                      "Query embeddings: .npy, .safetensors, or .jsonl with a query a line");
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
