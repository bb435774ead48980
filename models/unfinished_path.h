// What a process that is interrupted must not leave behind: the files it is writing, and the
// folders it made for them. Destructors do not run then; a list does that a signal handler can
// read.
#pragma once

#include <atomic>
#include <string>
#include <utility>

namespace trireme {

// While one of these lives, its path is on the list. Any thread.
class UnfinishedPath {
 public:
  UnfinishedPath() = default;
  // Before the file or folder is made.
  explicit UnfinishedPath(const std::string& path);
  ~UnfinishedPath() { Finished(); }
  UnfinishedPath(UnfinishedPath&& other) noexcept : entry_(std::exchange(other.entry_, nullptr)) {}
  UnfinishedPath& operator=(UnfinishedPath&& other) noexcept {
    std::swap(entry_, other.entry_);
    return *this;
  }
  // It has its name, or is gone: it is not removed any more.
  void Finished();

 private:
  struct Entry;
  static std::atomic<Entry*> first_;  // of the list
  Entry* entry_ = nullptr;

  friend void RemoveUnfinishedPaths();
};

// Removes all that is on the list, folders only when that leaves them empty; the process is about
// to end. Async-signal-safe, also while other threads add and remove paths.
void RemoveUnfinishedPaths();
// True from the beginning of RemoveUnfinishedPaths on. Who makes a file asks after that: it may
// have been made too late to be found.
bool UnfinishedPathsAreRemoved();

}  // namespace trireme
