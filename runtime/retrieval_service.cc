#include "runtime/retrieval_service.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "runtime/retrieval_graphs.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

constexpr int kCommandChannel = 31;  // of the control plane
enum class Command : uint8_t { kSearch, kUpsert, kDelete, kFinish };

void PutQuery(const RetrievalQuery& query, ByteWriter& out) {
  out.PutVector(query.embedding);
  out.Put(query.user_id);
  out.PutString(query.filter);
  out.PutVector(query.exclude_ids);
}

RetrievalQuery GetQuery(ByteReader& in) {
  RetrievalQuery query;
  query.embedding = in.GetVector<float>();
  query.user_id = in.Get<int64_t>();
  query.filter = in.GetString();
  query.exclude_ids = in.GetVector<int64_t>();
  return query;
}

}  // namespace

int RetrievalService::AddTable(RetrievalTable* table, RetrievalGraphs* graphs) {
  tables_.push_back(table);
  graphs_.push_back(graphs);
  CountTables();
  return static_cast<int>(tables_.size()) - 1;
}

absl::Status RetrievalService::Submit(RetrievalRequest request) {
  if (request.table < 0 || request.table >= static_cast<int>(tables_.size()))
    return absl::NotFoundError(absl::StrCat("retrieval: there is no table ", request.table));
  if (absl::Status status = CheckRetrievalOptions(request.options); !status.ok()) return status;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) return absl::UnavailableError("retrieval: the service is stopping");
  absl::Status status = batcher_.Add(std::move(request), std::chrono::steady_clock::now());
  changed_.notify_one();
  return status;
}

absl::Status RetrievalService::Submit(RetrievalUpdate update) {
  if (update.table < 0 || update.table >= static_cast<int>(tables_.size()))
    return absl::NotFoundError(absl::StrCat("retrieval: there is no table ", update.table));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) return absl::UnavailableError("retrieval: the service is stopping");
  absl::Status status = batcher_.Add(std::move(update), std::chrono::steady_clock::now());
  changed_.notify_one();
  return status;
}

bool RetrievalService::Step() {
  RetrievalBatcher::Work work;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // At the end nobody else can come: no reason to wait for a full batch.
    const auto now = stopping_ ? RetrievalBatcher::Time::max() : std::chrono::steady_clock::now();
    work = batcher_.Next(now);
    if (!work.requests.empty()) ++stats_.batches;
    stats_.requests += static_cast<int64_t>(work.requests.size());
    stats_.updates += work.update ? 1 : 0;
  }
  if (work.update) Update(*std::move(work.update));
  if (!work.requests.empty()) Search(std::move(work.requests));
  CountTables();
  const std::lock_guard<std::mutex> lock(mutex_);
  return batcher_.queued() > 0;
}

void RetrievalService::Run() {
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      while (!stopping_) {
        const auto due = batcher_.Due();
        if (due && *due <= std::chrono::steady_clock::now()) break;
        due ? (void)changed_.wait_until(lock, *due) : changed_.wait(lock);
      }
      if (stopping_ && batcher_.queued() == 0) return;
    }
    Step();
  }
}

void RetrievalService::Stop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  stopping_ = true;
  changed_.notify_one();
}

RetrievalServiceStats RetrievalService::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void RetrievalService::CountTables() {
  GraphStats graphs;
  Ledger held;
  std::vector<const MolModel*> models;
  for (size_t i = 0; i < tables_.size(); ++i) {
    Ledger ledger = RetrievalLedger(*tables_[i], graphs_[i]);
    const MolModel* const model = &tables_[i]->model();
    // Several tables may have one head.
    if (std::find(models.begin(), models.end(), model) != models.end()) ledger[Owner::kWeights] = 0;
    models.push_back(model);
    for (int owner = 0; owner < kOwners; ++owner) held.bytes[owner] += ledger.bytes[owner];
    if (graphs_[i] != nullptr) graphs += graphs_[i]->stats();
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  stats_.graphs = graphs;
  stats_.held = held;
}

void RetrievalService::Tell(const std::string& command) {
  for (int rank = 1; rank < group_.size(); ++rank) {
    group_.control->Send(rank, kCommandChannel, command);
  }
}

void RetrievalService::Search(std::vector<RetrievalRequest> requests) {
  ByteWriter out;
  out.Put(Command::kSearch);
  out.Put(requests[0].table);
  out.Put(requests[0].options);
  out.Put(static_cast<uint64_t>(requests.size()));
  std::vector<RetrievalQuery> queries;
  for (RetrievalRequest& request : requests) {
    PutQuery(request.query, out);
    queries.push_back(std::move(request.query));
  }
  Tell(out.Take());
  const int table = requests[0].table;
  auto answers =
      SearchTable(*tables_[table], queries, requests[0].options, {.graphs = graphs_[table]});
  for (size_t i = 0; i < requests.size(); ++i) {
    RetrievalAnswer answer;
    if (answers.ok()) {
      answer = std::move((*answers)[i]);
    } else {
      answer.status = answers.status();
    }
    if (!answer.status.ok()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++stats_.failed;
    }
    if (requests[i].done) requests[i].done(std::move(answer));
  }
}

void RetrievalService::Update(RetrievalUpdate update) {
  RetrievalTable& table = *tables_[update.table];
  ByteWriter out;
  absl::StatusOr<int64_t> result;
  if (update.delete_ids.empty()) {
    out.Put(Command::kUpsert);
    out.Put(update.table);
    out.PutVector(update.upsert.ids);
    out.PutVector(update.upsert.embeddings);
    out.PutVector(update.upsert.attributes);
    Tell(out.Take());
    result = table.Upsert(update.upsert);
  } else {
    out.Put(Command::kDelete);
    out.Put(update.table);
    out.PutVector(update.delete_ids);
    Tell(out.Take());
    result = table.Delete(update.delete_ids);
  }
  if (update.done) update.done(std::move(result));
}

void RetrievalService::Finish() {
  ByteWriter out;
  out.Put(Command::kFinish);
  Tell(out.Take());
}

// What a command gives is rank 0's to report: all ranks come to the same.
void RetrievalService::Follow() {
  CHECK(group_.rank() > 0);
  for (;;) {
    const std::string bytes = group_.control->Receive(0, kCommandChannel);
    ByteReader in(bytes);
    const auto command = in.Get<Command>();
    if (command == Command::kFinish) return;
    const int number = in.Get<int>();
    RetrievalTable& table = *tables_[number];
    if (command == Command::kSearch) {
      const auto options = in.Get<RetrievalOptions>();
      std::vector<RetrievalQuery> queries(in.Get<uint64_t>());
      for (RetrievalQuery& query : queries) query = GetQuery(in);
      (void)SearchTable(table, queries, options, {.graphs = graphs_[number]});
    } else if (command == Command::kUpsert) {
      RetrievalItems items;
      items.ids = in.GetVector<int64_t>();
      items.embeddings = in.GetVector<float>();
      items.attributes = in.GetVector<uint64_t>();
      (void)table.Upsert(items);
    } else {
      (void)table.Delete(in.GetVector<int64_t>());
    }
  }
}

}  // namespace trireme
