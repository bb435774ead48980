#include "models/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"

namespace trireme {
namespace {

constexpr int kMaxLinks = 40;  // as Linux

// What `path` names when its links are followed; the last one may lead to what is not there yet,
// which realpath(3) would refuse.
absl::StatusOr<std::string> FollowLinks(const std::string& path) {
  std::filesystem::path at = path;
  std::error_code none;
  for (int i = 0; i < kMaxLinks; ++i) {
    const std::filesystem::path next = std::filesystem::read_symlink(at, none);
    if (none) return at.string();
    at = next.is_absolute() ? next : at.parent_path() / next;
  }
  return absl::ErrnoToStatus(ELOOP, absl::StrCat(path, ": cannot be written"));
}

absl::Status SyncDirectoryOf(const std::string& path) {
  const std::string dir = std::filesystem::path(path).parent_path().string();
  const int fd = open(dir.empty() ? "." : dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return absl::ErrnoToStatus(errno, dir);
  const bool good = fsync(fd) == 0;
  const absl::Status status = good ? absl::OkStatus() : absl::ErrnoToStatus(errno, dir);
  close(fd);
  return status;
}

}  // namespace

absl::StatusOr<std::unique_ptr<OutputFile>> OutputFile::Create(const std::string& path, Sync sync) {
  std::unique_ptr<OutputFile> file(new OutputFile);
  file->path_ = path;
  file->sync_ = sync;
  struct stat info {};
  const bool there = stat(path.c_str(), &info) == 0;
  if (there && S_ISDIR(info.st_mode))
    return absl::InvalidArgumentError(absl::StrCat(path, ": is a directory; name a file"));
  if (there && !S_ISREG(info.st_mode)) {
    file->fd_ = open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY);
  } else {
    ASSIGN_OR_RETURN(file->target_, FollowLinks(path));
    file->partial_ = file->target_ + ".partial";
    file->unfinished_ = UnfinishedPath(file->partial_);
    file->fd_ =
        open(file->partial_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0666);
  }
  if (file->fd_ < 0) return absl::ErrnoToStatus(errno, absl::StrCat(path, ": cannot be written"));
  if (UnfinishedPathsAreRemoved()) return absl::CancelledError(absl::StrCat(path, ": interrupted"));
  return file;
}

OutputFile::~OutputFile() {
  if (fd_ < 0) return;
  close(fd_);
  if (!partial_.empty()) unlink(partial_.c_str());
}

absl::Status OutputFile::Write(const void* data, int64_t bytes) {
  const auto* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = write(fd_, from, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::ErrnoToStatus(errno, absl::StrCat(path_, ": writing"));
    from += n;
    bytes -= n;
  }
  return absl::OkStatus();
}

absl::Status OutputFile::CloseAndRename() {
  const bool as_it_is = partial_.empty();
  const bool synced = sync_ == Sync::kNo || as_it_is || fsync(fd_) == 0;
  const int fsync_error = errno;
  // Some file systems report a full disk only here.
  const bool closed = close(std::exchange(fd_, -1)) == 0;
  if (!synced) errno = fsync_error;
  if (!synced || !closed || (!as_it_is && rename(partial_.c_str(), target_.c_str()) != 0))
    return absl::ErrnoToStatus(errno, absl::StrCat(path_, ": finishing"));
  return sync_ == Sync::kNo || as_it_is ? absl::OkStatus() : SyncDirectoryOf(target_);
}

absl::Status OutputFile::Finish() {
  const absl::Status status = CloseAndRename();
  if (!status.ok() && !partial_.empty()) unlink(partial_.c_str());
  unfinished_.Finished();
  return status;
}

}  // namespace trireme
