#include "models/unfinished_path.h"

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <mutex>

namespace trireme {

// Entries are used again and never freed: a handler may be reading one.
struct UnfinishedPath::Entry {
  std::atomic<bool> listed{false};
  bool taken = false;  // under g_mutex
  char path[PATH_MAX] = {};
  Entry* next = nullptr;
};

std::atomic<UnfinishedPath::Entry*> UnfinishedPath::first_{nullptr};

namespace {
std::mutex g_mutex;  // of who adds and removes; the handler takes none
std::atomic<bool> g_removing{false};
}  // namespace

UnfinishedPath::UnfinishedPath(const std::string& path) {
  if (path.size() >= PATH_MAX) return;  // nothing can have this name
  const std::lock_guard<std::mutex> lock(g_mutex);
  Entry* const first = first_.load();
  entry_ = first;
  while (entry_ != nullptr && entry_->taken) entry_ = entry_->next;
  const bool fresh = entry_ == nullptr;
  if (fresh) entry_ = new Entry;
  entry_->taken = true;
  // The entry went off the list before this look at g_removing. So a handler that could still be
  // reading its old path is seen here, and one that begins later passes it over until it is back.
  if (g_removing.load()) return;
  std::memcpy(entry_->path, path.c_str(), path.size() + 1);
  entry_->listed.store(true);
  if (!fresh) return;
  entry_->next = first;
  first_.store(entry_);
}

void UnfinishedPath::Finished() {
  if (entry_ == nullptr) return;
  const std::lock_guard<std::mutex> lock(g_mutex);
  entry_->listed.store(false);
  entry_->taken = false;
  entry_ = nullptr;
}

void RemoveUnfinishedPaths() {
  const int error = errno;
  g_removing.store(true);
  for (const bool folders : {false, true}) {
    for (auto* entry = UnfinishedPath::first_.load(); entry != nullptr; entry = entry->next) {
      if (!entry->listed.load()) continue;
      [[maybe_unused]] const int gone = folders ? rmdir(entry->path) : unlink(entry->path);
    }
  }
  errno = error;
}

bool UnfinishedPathsAreRemoved() { return g_removing.load(); }

}  // namespace trireme
