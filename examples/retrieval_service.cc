// Serves queries while the table changes: the whole of runtime/retrieval_service.h in one page.
//
//   mpirun -n 4 build/cpu/bin/retrieval_service_example [items] [queries] [updates a second]
//
// Makes a planted table of 100,000 items sharded over the ranks, then three client threads ask on
// rank 0 while a fourth replaces and deletes items; prints what a person wants to know of it.
#include "runtime/retrieval_service.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "models/mol_planted.h"
#include "parallel/process_groups.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kClients = 3, kK = 100;

struct Answers {
  std::mutex mutex;
  std::vector<double> milliseconds;
  int64_t failed = 0, deleted_seen = 0;
};

// An upsert's items, as a file would hold them.
RetrievalItems Planted(const PlantedMol& planted, int64_t first, int64_t count) {
  RetrievalItems items;
  for (int64_t i = 0; i < count; ++i) items.ids.push_back(first + i);
  items.embeddings.resize(count * planted.config().item_dim);
  planted.FillItems(first, count, items.embeddings.data());
  return items;
}

void Ask(RetrievalService& service, const PlantedMol& planted, int64_t first, int64_t count,
         const std::atomic<int64_t>& deleted, Answers& answers) {
  for (int64_t q = first; q < first + count; ++q) {
    RetrievalRequest request;
    request.options.k = kK;
    request.query.embedding.resize(planted.config().query_dim);
    planted.FillQueries(q, 1, request.query.embedding.data());
    std::atomic<bool> done{false};
    const Clock::time_point begin = Clock::now();
    // What was deleted before the question must not be in the answer.
    const int64_t gone = deleted;
    request.done = [&](const RetrievalAnswer& answer) {
      const std::chrono::duration<double, std::milli> took = Clock::now() - begin;
      const std::lock_guard<std::mutex> lock(answers.mutex);
      answers.milliseconds.push_back(took.count());
      answers.failed += answer.status.ok() ? 0 : 1;
      for (const int64_t id : answer.ids) answers.deleted_seen += id >= 0 && id < gone ? 1 : 0;
      done = true;
      done.notify_one();
    };
    if (service.Submit(std::move(request)).ok()) done.wait(false);
  }
}

// Deletes item after item from the front and adds new ones at the back.
void Change(RetrievalService& service, const PlantedMol& planted, int64_t items, int64_t per_second,
            const std::atomic<bool>& stop, std::atomic<int64_t>& deleted) {
  for (int64_t i = 0; !stop && i < items / 2; ++i) {
    RetrievalUpdate gone, added;
    gone.delete_ids = {i};
    gone.done = [&deleted, i](const absl::StatusOr<int64_t>&) { deleted = i + 1; };
    added.upsert = Planted(planted, items + i, 1);
    if (!service.Submit(std::move(gone)).ok() || !service.Submit(std::move(added)).ok()) return;
    std::this_thread::sleep_for(std::chrono::microseconds(1'000'000 / per_second));
  }
}

double Quantile(std::vector<double>& sorted, double q) {
  return sorted[std::min(sorted.size() - 1, static_cast<size_t>(q * sorted.size()))];
}

void Report(const RetrievalService& service, const RetrievalTable& table, double seconds,
            Answers& answers) {
  std::vector<double>& ms = answers.milliseconds;
  std::sort(ms.begin(), ms.end());
  const RetrievalServiceStats stats = service.stats();
  std::printf("%zu queries in %.2f s: %.0f a second, median %.1f ms, 99%% below %.1f ms\n",
              ms.size(), seconds, ms.size() / seconds, Quantile(ms, 0.5), Quantile(ms, 0.99));
  std::printf("%lld batches of %.1f queries; %lld updates meanwhile; %lld items at the end\n",
              static_cast<long long>(stats.batches),
              static_cast<double>(stats.requests) / static_cast<double>(stats.batches),
              static_cast<long long>(stats.updates), static_cast<long long>(table.size()));
  std::printf("failed queries: %lld; deleted items answered: %lld\n",
              static_cast<long long>(answers.failed), static_cast<long long>(answers.deleted_seen));
}

int Serve(ControlPlane& control, const RetrievalGroup& group, const PlantedMol& planted,
          int64_t items, int64_t queries, int64_t per_second, const std::string& dir) {
  const auto model = MolModel::Load(dir, *group.stream);
  if (!model.ok()) return std::printf("%s\n", model.status().ToString().c_str()), 1;
  RetrievalTableOptions options;
  options.capacity = items + items / 2;
  const auto table = RetrievalTable::Create(group, **model, {}, options);
  if (!table.ok()) return std::printf("%s\n", table.status().ToString().c_str()), 1;
  constexpr int64_t kChunk = 10000;
  for (int64_t first = 0; first < items; first += kChunk) {
    const auto added = (*table)->Upsert(Planted(planted, first, std::min(kChunk, items - first)));
    if (!added.ok()) return std::printf("%s\n", added.status().ToString().c_str()), 1;
  }
  RetrievalService service(group, {});
  service.AddTable(table->get());
  if (control.rank() > 0) return service.Follow(), 0;
  std::printf("%lld items on %d ranks\n", static_cast<long long>((*table)->size()), group.size());
  Answers answers;
  std::atomic<bool> stop{false};
  std::atomic<int64_t> deleted{0};
  const Clock::time_point begin = Clock::now();
  std::thread updates([&] { Change(service, planted, items, per_second, stop, deleted); });
  std::thread clients([&] {
    std::vector<std::thread> all;
    for (int c = 0; c < kClients; ++c) {
      all.emplace_back(
          [&, c] { Ask(service, planted, c * queries, queries / kClients, deleted, answers); });
    }
    for (std::thread& client : all) client.join();
    stop = true;
    updates.join();
    service.Stop();
  });
  service.Run();
  clients.join();
  const std::chrono::duration<double> seconds = Clock::now() - begin;
  service.Finish();
  Report(service, **table, seconds.count(), answers);
  return answers.failed == 0 && answers.deleted_seen == 0 ? 0 : 1;
}

int Main(int argc, char** argv) {
  const auto number = [&](int i, int64_t otherwise) {
    return argc > i ? std::max<int64_t>(1, std::atoll(argv[i])) : otherwise;
  };
  const int64_t items = number(1, 100'000), queries = std::max<int64_t>(kClients, number(2, 300));
  const auto control = ControlPlane::Start(nullptr, nullptr);
  if (!control.ok()) return std::printf("%s\n", control.status().ToString().c_str()), 1;
  const auto device = OpenDevice({.name = "cpu", .threads = 1}).value();
  const auto stream = device->NewStream().value();
  const ProcessGroups groups =
      CreateProcessGroups(**control, {.tp_size = (*control)->size()}, *device).value();
  const RetrievalGroup group{control->get(), groups.tp.get(), stream.get()};
  const PlantedMol planted({});
  std::string dir;
  if ((*control)->rank() == 0) {
    std::string pattern = std::filesystem::temp_directory_path() / "trireme_XXXXXX";
    dir = mkdtemp(pattern.data()) != nullptr ? pattern : "";
    if (!planted.WriteModel(dir).ok()) dir.clear();
  }
  (*control)->Broadcast(&dir);
  const int status = Serve(**control, group, planted, items, queries, number(3, 100), dir);
  (*control)->Barrier();
  std::error_code ignored;
  if ((*control)->rank() == 0) std::filesystem::remove_all(dir, ignored);
  return status;
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) { return trireme::Main(argc, argv); }
