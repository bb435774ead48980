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

namespace trireme {
namespace {

namespace fs = std::filesystem;

// A component is part of the library (Open MPI 5) or a file of its own, in a folder below the
// library's (the longer ones are Debian's) or one that the user names.
bool HasMpiComponent(const Environment& environment, const std::string& component) {
  if (dlsym(RTLD_DEFAULT, absl::StrCat("mca_", component, "_component").c_str()) != nullptr)
    return true;
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
  return std::any_of(folders.begin(), folders.end(), [&component](const std::string& folder) {
    return access(absl::StrCat(folder, "/mca_", component, ".so").c_str(), F_OK) == 0;
  });
}

// The frameworks without which MPI, or its mpirun, does not start, and a component that each has in
// every Open MPI that has the framework; without that one it is not known where components are.
// Others, mtl or memheap, may name what is not there. Those of PMIx are in a library that is not
// loaded yet.
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

}  // namespace

std::map<std::string, std::string> AbsentMpiComponents(const Environment& environment) {
  std::map<std::string, std::string> absent;
  if (environment.mpi_loaded.empty()) return absent;
  for (const auto& [framework, certain] : kFrameworks) {
    const std::string variable = absl::StrCat("OMPI_MCA_", framework);
    const std::string& value = environment.Variable(variable);
    // A list that begins with ^ excludes, and may exclude what is not there.
    if (value.empty() || absl::StartsWith(value, "^")) continue;
    if (!HasMpiComponent(environment, absl::StrCat(framework, "_", certain))) continue;
    const std::vector<std::string> names = absl::StrSplit(value, ',', absl::SkipEmpty());
    for (const std::string& name : names) {
      // The name of Open MPI 4 for sm of Open MPI 5, which takes both.
      const std::string& wanted =
          name == "vader" && !absl::StartsWith(environment.mpi_loaded, "4") ? "sm" : name;
      if (HasMpiComponent(environment, absl::StrCat(framework, "_", wanted))) continue;
      absent[variable] = name;
      break;
    }
  }
  return absent;
}

}  // namespace trireme
