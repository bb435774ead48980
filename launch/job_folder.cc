#include "launch/job_folder.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace trireme {
namespace {

// Where Open MPI keeps what the ranks of a host share, by its names in Open MPI 4 and 5.
constexpr const char* kSharedMemoryFolders[] = {"OMPI_MCA_btl_vader_backing_directory",
                                                "OMPI_MCA_btl_sm_backing_directory",
                                                "OMPI_MCA_osc_sm_backing_directory"};

// Removes the empty folders of supervisors that were killed. One that has just been made, by a
// process that cannot be seen from here, is left alone.
void RemoveAbandonedFolders(const std::string& where) {
  constexpr auto kAge = std::chrono::minutes(10);
  const auto now = std::filesystem::file_time_type::clock::now();
  std::error_code error;
  for (std::filesystem::directory_iterator it(where, error), end; !error && it != end;
       it.increment(error)) {
    int pid = 0;
    const std::string name = it->path().filename().string();
    std::error_code ignored;
    if (std::sscanf(name.c_str(), "trireme-%d-", &pid) != 1 || pid <= 0 || kill(pid, 0) == 0 ||
        errno != ESRCH || now - it->last_write_time(ignored) < kAge)
      continue;
    rmdir(it->path().c_str());
  }
}

}  // namespace

JobFolder::JobFolder() {
  const char* const chosen = std::getenv(kSharedMemoryFolders[0]);
  const std::string where = chosen != nullptr ? chosen : "/dev/shm";
  RemoveAbandonedFolders(where);
  std::string name = absl::StrCat(where, "/trireme-", getpid(), "-XXXXXX");
  if (mkdtemp(name.data()) == nullptr) return;
  path_ = name;
  for (const char* variable : kSharedMemoryFolders) setenv(variable, path_.c_str(), 1);
}

JobFolder::~JobFolder() {
  std::error_code ignored;
  if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
}

void JobFolder::Empty() const {
  std::error_code ignored;
  if (path_.empty()) return;
  std::filesystem::remove_all(path_, ignored);
  std::filesystem::create_directory(path_, ignored);
  std::filesystem::permissions(path_, std::filesystem::perms::owner_all, ignored);
}

void RemoveJobFolder() {
  const char* const folder = std::getenv(kSharedMemoryFolders[0]);
  if (folder != nullptr && absl::StrContains(folder, "/trireme-")) rmdir(folder);
}

}  // namespace trireme
