// CollectEnvironment: the one place that reads the environment's variables and the machine's files
// for launch/environment.h.

#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <mpi.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "launch/environment.h"
#include "launch/mpi_components.h"

extern char** environ;

namespace trireme {
namespace {

namespace fs = std::filesystem;

// Empty when it cannot be read. Files below /proc and /sys have no size to ask for.
std::string ReadText(const std::string& path) {
  std::ifstream in(path);
  std::string text(std::istreambuf_iterator<char>(in), {});
  return text;
}

bool IsOfInterest(absl::string_view name) {
  if (name == "SLURM_JWT") return false;  // a secret
  for (const char* prefix :
       {"OMPI_", "OPAL_", "PMIX_", "PRTE_", "PMI_", "PMI2_", "MPI_", "MPIR_", "SLURM_", "SLURMD_",
        "CUDA_", "NVIDIA_", "NCCL_", "APPTAINER_", "SINGULARITY_", "OMP_"}) {
    if (absl::StartsWith(name, prefix)) return true;
  }
  return name == "LD_LIBRARY_PATH" || name == "LD_PRELOAD" || name == "container";
}

void ReadVariables(Environment* out) {
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(*entry, absl::MaxSplits('=', 1));
    if (IsOfInterest(parts.first)) {
      out->variables[std::string(parts.first)] =
          std::string(parts.second.substr(0, std::min<size_t>(parts.second.size(), 4096)));
    }
  }
}

// "btl_tcp_if_include = 10.0.0.0/8" of the files that Open MPI reads, the user's last.
void ReadMpiParameters(const std::string& root, Environment* out) {
  std::vector<std::string> files = {"/etc/openmpi/openmpi-mca-params.conf",
                                    "/etc/openmpi-mca-params.conf"};
  if (const char* home = std::getenv("HOME"))
    files.push_back(absl::StrCat(home, "/.openmpi/mca-params.conf"));
  for (const std::string& file : files) {
    for (absl::string_view line : absl::StrSplit(ReadText(root + file), '\n')) {
      const std::pair<absl::string_view, absl::string_view> parts =
          absl::StrSplit(line, absl::MaxSplits('=', 1));
      const std::string name(absl::StripAsciiWhitespace(parts.first));
      if (absl::StartsWith(name, "btl_tcp_if_"))
        out->mpi_parameters[name] = std::string(absl::StripAsciiWhitespace(parts.second));
    }
  }
}

bool InContainer(const std::string& root, const Environment& environment) {
  return access((root + "/.dockerenv").c_str(), F_OK) == 0 ||
         access((root + "/run/.containerenv").c_str(), F_OK) == 0 ||
         environment.Has("APPTAINER_CONTAINER") || environment.Has("SINGULARITY_CONTAINER") ||
         environment.Has("container");
}

// Whether process `pid` is this one or one above it.
bool IsOurs(const std::string& root, int pid) {
  int current = getpid();
  for (int depth = 0; current > 1 && depth < 64; ++depth) {
    if (current == pid) return true;
    const std::string stat = ReadText(absl::StrCat(root, "/proc/", current, "/stat"));
    // "pid (name) state parent ...": a name may hold anything, parentheses included.
    const size_t after = stat.rfind(')');
    char state = 0;
    if (after == std::string::npos ||
        std::sscanf(stat.c_str() + after + 1, " %c %d", &state, &current) != 2)
      return false;
  }
  return false;
}

// libmpi.so.40 of Open MPI, libmpi.so.12 of MPICH and Intel MPI, libmpich.so.12 of Debian's.
void ReadMpi(const std::string& root, Environment* out) {
#if defined(OMPI_MAJOR_VERSION)
  out->mpi_built =
      absl::StrCat(OMPI_MAJOR_VERSION, ".", OMPI_MINOR_VERSION, ".", OMPI_RELEASE_VERSION);
#endif
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  int major = 0, minor = 0, release = 0;
  // Open MPI v4.1.4, package: ...
  if (MPI_Get_library_version(text, &length) == MPI_SUCCESS &&
      std::sscanf(text, "Open MPI v%d.%d.%d", &major, &minor, &release) == 3)
    out->mpi_loaded = absl::StrCat(major, ".", minor, ".", release);
  std::set<std::string> files;
  for (absl::string_view line : absl::StrSplit(ReadText(root + "/proc/self/maps"), '\n')) {
    const size_t path = line.find('/');
    if (path == absl::string_view::npos) continue;
    const absl::string_view name = line.substr(line.rfind('/') + 1);
    if (absl::StartsWith(name, "libmpi.so") || absl::StartsWith(name, "libmpich.so"))
      files.emplace(line.substr(path));
  }
  out->mpi_libraries.assign(files.begin(), files.end());
}

void ReadInterfaces(Environment* out) {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || entry->ifa_addr->sa_family != AF_INET ||
        (entry->ifa_flags & IFF_UP) == 0)
      continue;
    char text[INET_ADDRSTRLEN] = {};
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(entry->ifa_addr)->sin_addr, text,
              sizeof(text));
    NetworkInterface interface { .name = entry->ifa_name, .address = text };
    if (entry->ifa_netmask != nullptr) {
      const auto* mask = reinterpret_cast<const sockaddr_in*>(entry->ifa_netmask);
      interface.prefix_bits = std::popcount(mask->sin_addr.s_addr);
    }
    out->interfaces.push_back(std::move(interface));
  }
  freeifaddrs(list);
}

std::vector<std::string> FilesOf(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
    names.push_back(it->path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

// The driver lists its GPUs by PCI address; sysfs says where each is attached.
void ReadGpus(const std::string& root, Environment* out) {
  const std::string driver = root + "/proc/driver/nvidia";
  const std::string version = ReadText(driver + "/version");
  if (version.empty()) return;
  // NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
  for (absl::string_view word : absl::StrSplit(version, absl::ByAnyChar(" \t\n"))) {
    if (word.size() > 4 && absl::ascii_isdigit(word[0]) && absl::StrContains(word, ".")) {
      out->nvidia_driver = std::string(word);
      break;
    }
  }
  for (const std::string& address : FilesOf(driver + "/gpus")) {
    Gpu gpu{.pci_address = address, .uuid = {}};
    const std::string information = ReadText(driver + "/gpus/" + address + "/information");
    for (absl::string_view line : absl::StrSplit(information, '\n')) {
      if (!absl::StartsWith(line, "GPU UUID:")) continue;
      gpu.uuid = std::string(absl::StripAsciiWhitespace(line.substr(9)));
    }
    const std::string node =
        ReadText(absl::StrCat(root, "/sys/bus/pci/devices/", address, "/numa_node"));
    int number = -1;
    if (absl::SimpleAtoi(absl::StripAsciiWhitespace(node), &number)) gpu.numa_node = number;
    out->gpus.push_back(std::move(gpu));
  }
}

// As Open MPI looks for it.
void ReadSessionFolder(Environment* out) {
  out->session_folder = "/tmp";
  for (const char* name : {"TEMP", "TMP", "TMPDIR"}) {
    const char* const value = std::getenv(name);
    if (value != nullptr && *value != '\0') out->session_folder = value;
  }
  struct statvfs folder;
  struct stat what;
  const char* const path = out->session_folder.c_str();
  // /proc lets nobody make anything, and lets root believe otherwise.
  const bool usable = stat(path, &what) == 0 && S_ISDIR(what.st_mode) &&
                      access(path, W_OK | X_OK) == 0 && statvfs(path, &folder) == 0 &&
                      folder.f_blocks > 0;
  if (usable) {
    out->session_free_bytes =
        static_cast<int64_t>(folder.f_bavail) * static_cast<int64_t>(folder.f_frsize);
  }
}

void ReadLimits(const std::string& root, Environment* out) {
  struct statvfs shm;
  if (statvfs((root + "/dev/shm").c_str(), &shm) == 0 && access("/dev/shm", W_OK) == 0)
    out->shm_free_bytes = static_cast<int64_t>(shm.f_bavail) * static_cast<int64_t>(shm.f_frsize);
  rlimit limit;
  if (getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
    out->locked_memory_bytes = static_cast<int64_t>(limit.rlim_cur);
  cpu_set_t cores;
  CPU_ZERO(&cores);
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) out->cores = CPU_COUNT(&cores);
  out->infiniband = !FilesOf(root + "/sys/class/infiniband").empty();
}

// Threads of one core name each other in /sys.
int PhysicalCores(const std::string& root) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return 0;
  std::set<std::string> siblings;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &allowed)) continue;
    siblings.insert(ReadText(
        absl::StrCat(root, "/sys/devices/system/cpu/cpu", core, "/topology/thread_siblings_list")));
  }
  return siblings.count("") != 0 ? 0 : static_cast<int>(siblings.size());
}

std::string OnPath(const std::string& program) {
  const char* path = std::getenv("PATH");
  for (absl::string_view folder : absl::StrSplit(path == nullptr ? "" : path, ':')) {
    const std::string file = absl::StrCat(folder.empty() ? "." : folder, "/", program);
    if (access(file.c_str(), X_OK) == 0 && fs::is_regular_file(file)) return file;
  }
  return "";
}

// Standard output of `program --version`, in a process group of its own. Below 0: it did not start.
pid_t StartVersion(const std::string& program, int out) {
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&files, out, STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&files, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  const char* const argv[] = {program.c_str(), "--version", nullptr};
  pid_t pid = -1;
  if (posix_spawn(&pid, program.c_str(), &files, &attributes, const_cast<char* const*>(argv),
                  environ) != 0)
    pid = -1;
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
  return pid;
}

// The beginning of what a program prints as its version. Empty when it does not start or prints
// nothing; one that does not end is ended.
std::string VersionOf(const std::string& program) {
  constexpr size_t kMostBytes = 1024;
  constexpr std::chrono::seconds kPatience(10);
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return "";
  const pid_t pid = StartVersion(program, ends[1]);
  close(ends[1]);
  std::string text;
  const auto until = std::chrono::steady_clock::now() + kPatience;
  while (pid > 0 && text.size() < kMostBytes) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        until - std::chrono::steady_clock::now());
    pollfd wait{ends[0], POLLIN, 0};
    if (left.count() <= 0 || poll(&wait, 1, static_cast<int>(left.count())) <= 0) break;
    char piece[kMostBytes];
    const ssize_t n = read(ends[0], piece, kMostBytes - text.size());
    if (n <= 0) break;
    text.append(piece, static_cast<size_t>(n));
  }
  close(ends[0]);
  if (pid > 0) {
    kill(-pid, SIGKILL);
    waitpid(pid, nullptr, 0);
  }
  return text;
}

void ReadNccl(Environment* out) {
  for (const char* name : {"libnccl.so.2", "libnccl.so", "libnccl.so.3", "libnccl.so.1"}) {
    // Never closed: libraries with threads of their own do not survive that.
    void* const library = dlopen(name, RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      const char* const error = dlerror();
      if (out->nccl_error.empty()) out->nccl_error = error;  // of the one that is wanted
      continue;
    }
    const auto get = reinterpret_cast<int (*)(int*)>(dlsym(library, "ncclGetVersion"));
    if (get != nullptr && get(&out->nccl) == 0) {
      out->nccl_error.clear();
    } else {
      out->nccl = 0;
      out->nccl_error = absl::StrCat(name, ": does not tell its version");
    }
    return;
  }
}

}  // namespace

Environment CollectEnvironment(const CollectOptions& options) {
  const std::string& root = options.root;
  Environment out;
  ReadVariables(&out);
  ReadMpiParameters(root, &out);
  char host[256] = {};
  if (gethostname(host, sizeof(host) - 1) == 0) out.host = host;
  out.user_id = static_cast<int64_t>(geteuid());
  out.container = InContainer(root, out);
  out.slurm_task_is_ours =
      out.Number("SLURM_TASK_PID") > 0 && IsOurs(root, out.Number("SLURM_TASK_PID"));
  ReadMpi(root, &out);
  out.absent_mpi_components = AbsentMpiComponents(out);
  ReadSessionFolder(&out);
  ReadLimits(root, &out);
  ReadInterfaces(&out);
  ReadGpus(root, &out);
#if defined(TRIREME_CUDA_RUNTIME)
  out.cuda_runtime = TRIREME_CUDA_RUNTIME;
#endif
  if (options.programs) {
    out.mpirun = OnPath("mpirun");
    out.srun = OnPath("srun");
    // Ranks that are there already need no mpirun.
    if (!out.mpirun.empty() && IdentifyLaunch(out).launcher == Launcher::kAlone)
      out.mpirun_version = VersionOf(out.mpirun);
    out.physical_cores = PhysicalCores(root);
    ReadNccl(&out);
  }
  return out;
}

void PrepareEnvironment(const Environment& environment) {
  for (const auto& [name, value] : Preparations(environment)) {
    if (value.empty()) {
      unsetenv(name.c_str());
    } else {
      setenv(name.c_str(), value.c_str(), /*overwrite=*/1);
    }
  }
}

}  // namespace trireme
