#include "launch/mpi_components.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

// A component is part of the library (Open MPI 5) or a file of its own, in a folder below the
// library's (the longer ones are Debian's) or one that the user names.
std::vector<std::string> MpiComponentFolders(const Environment& environment) {
  std::vector<std::string> folders = absl::StrSplit(
      environment.Variable("OMPI_MCA_mca_base_component_path"), ':', absl::SkipEmpty());
  if (const char* home = std::getenv("HOME"))
    folders.push_back(absl::StrCat(home, "/.openmpi/components"));
  for (const std::string& library : environment.mpi_libraries) {
    const std::string beside = fs::path(library).parent_path().string();
    for (const char* folder :
         {"/openmpi", "/openmpi3", "/openmpi/lib/openmpi", "/openmpi/lib/openmpi3"})
      folders.push_back(beside + folder);
  }
  return folders;
}

bool HasMpiComponent(const Environment& environment, const std::string& component) {
  if (dlsym(RTLD_DEFAULT, absl::StrCat("mca_", component, "_component").c_str()) != nullptr)
    return true;
  const std::vector<std::string> folders = MpiComponentFolders(environment);
  return std::any_of(folders.begin(), folders.end(), [&component](const std::string& folder) {
    return access(absl::StrCat(folder, "/mca_", component, ".so").c_str(), F_OK) == 0;
  });
}

// The frameworks without which MPI, or its mpirun, does not start, and a component that each has in
// every Open MPI that has the framework; without that one it is not known where components are.
// Others, mtl or memheap, may name what is not there.
struct Framework {
  const char *name, *certain;
};
constexpr Framework kFrameworks[] = {{"allocator", "basic"},
                                     {"bml", "r2"},
                                     {"btl", "self"},
                                     {"coll", "basic"},
                                     {"errmgr", "default_hnp"},
                                     {"ess", "hnp"},
                                     {"filem", "raw"},
                                     {"grpcomm", "direct"},
                                     {"io", "ompio"},
                                     {"iof", "hnp"},
                                     {"mpool", "hugepage"},
                                     {"odls", "default"},
                                     {"oob", "tcp"},
                                     {"op", "avx"},
                                     {"osc", "sm"},
                                     {"plm", "rsh"},
                                     {"pmix", "isolated"},
                                     {"pml", "ob1"},
                                     {"pstat", "linux"},
                                     {"ras", "simulator"},
                                     {"rcache", "grdma"},
                                     {"reachable", "weighted"},
                                     {"regx", "fwd"},
                                     {"rmaps", "round_robin"},
                                     {"rml", "oob"},
                                     {"routed", "direct"},
                                     {"rtc", "hwloc"},
                                     {"schizo", "ompi"},
                                     {"shmem", "mmap"},
                                     {"state", "hnp"}};

// A list that begins with ^ excludes, and may exclude what is not there.
std::vector<std::string> AskedFor(const std::string& value) {
  if (absl::StartsWith(value, "^")) return {};
  return absl::StrSplit(value, ',', absl::SkipEmpty());
}

// Without one of those that they are asked for PMIx fails, or its caller crashes. Others of its
// frameworks do without.
constexpr absl::string_view kPmixFrameworks[] = {"bfrops", "gds",    "pif",    "preg",
                                                 "psec",   "pshmem", "psquash"};

// Where PMIx is looked for: Open MPI 5 is linked to it, and Open MPI 4 has a component that is. One
// that is built into the component, with other names, is not found, and not judged.
std::vector<void*> PmixHandles(const Environment& environment) {
  std::vector<void*> handles = {RTLD_DEFAULT};
  for (const std::string& folder : MpiComponentFolders(environment)) {
    std::error_code no_folder;
    for (const auto& file : fs::directory_iterator(folder, no_folder)) {
      if (!absl::StartsWith(file.path().filename().string(), "mca_pmix_")) continue;
      // Stays open: MPI_Init opens it again.
      void* const handle = dlopen(file.path().c_str(), RTLD_LAZY | RTLD_LOCAL);
      if (handle != nullptr) handles.push_back(handle);
    }
  }
  return handles;
}

// As HasMpiComponent, of the PMIx that has this framework. Before PMIx 4 names had no pmix_.
bool HasPmixComponent(const Environment& environment, void* handle, const void* framework,
                      const std::string& component) {
  std::vector<std::string> folders = absl::StrSplit(
      environment.Variable("PMIX_MCA_mca_base_component_path"), ':', absl::SkipEmpty());
  Dl_info library;
  std::error_code unknown;
  if (dladdr(framework, &library) != 0)
    folders.push_back(fs::canonical(library.dli_fname, unknown).parent_path() / "pmix");
  for (const char* prefix : {"pmix_mca_", "mca_"}) {
    const std::string name = absl::StrCat(prefix, component);
    if (dlsym(handle, absl::StrCat(name, "_component").c_str()) != nullptr) return true;
    for (const std::string& folder : folders) {
      if (access(absl::StrCat(folder, "/", name, ".so").c_str(), F_OK) == 0) return true;
    }
  }
  return false;
}

void AddAbsentPmixComponents(const Environment& environment,
                             std::map<std::string, std::string>* absent) {
  std::vector<void*> handles;
  for (const absl::string_view name : kPmixFrameworks) {
    const std::string variable = absl::StrCat("PMIX_MCA_", name);
    const std::vector<std::string> asked_for = AskedFor(environment.Variable(variable));
    if (asked_for.empty()) continue;
    if (handles.empty()) handles = PmixHandles(environment);
    for (void* const handle : handles) {
      const void* const framework =
          dlsym(handle, absl::StrCat("pmix_", name, "_base_framework").c_str());
      if (framework == nullptr) continue;
      const auto has = [&](const std::string& component) {
        return HasPmixComponent(environment, handle, framework, absl::StrCat(name, "_", component));
      };
      if (std::none_of(asked_for.begin(), asked_for.end(), has))
        absent->emplace(variable, asked_for.front());
      break;
    }
  }
}

}  // namespace

std::map<std::string, std::string> AbsentMpiComponents(const Environment& environment) {
  std::map<std::string, std::string> absent;
  if (environment.mpi_loaded.empty()) return absent;
  AddAbsentPmixComponents(environment, &absent);
  for (const auto& [framework, certain] : kFrameworks) {
    const std::string variable = absl::StrCat("OMPI_MCA_", framework);
    const std::vector<std::string> asked_for = AskedFor(environment.Variable(variable));
    if (asked_for.empty()) continue;
    if (!HasMpiComponent(environment, absl::StrCat(framework, "_", certain))) continue;
    const auto has = [&](const std::string& name) {
      // The name of Open MPI 4 for sm of Open MPI 5, which takes both.
      const bool renamed = name == "vader" && !absl::StartsWith(environment.mpi_loaded, "4");
      return HasMpiComponent(environment, absl::StrCat(framework, "_", renamed ? "sm" : name));
    };
    const auto first = std::find_if_not(asked_for.begin(), asked_for.end(), has);
    if (first != asked_for.end()) absent[variable] = *first;
  }
  const std::string& prefix = environment.Variable("OPAL_PREFIX");
  if (!prefix.empty() && access(prefix.c_str(), F_OK) != 0) absent["OPAL_PREFIX"] = prefix;
  return absent;
}

}  // namespace trireme
