#include "parallel/nccl/nccl_api.h"

#include <dlfcn.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "parallel/nccl_fault.h"

namespace trireme {
namespace {

static_assert(NCCL_MAJOR == kNcclMajor);

absl::StatusOr<NcclApi> Load() {
  void* const library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return absl::UnavailableError(NcclIsMissing(dlerror()).Line());
  NcclApi api{};
  std::string missing;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) missing = name;
  };
  find(api.GetVersion, "ncclGetVersion");
  find(api.GetErrorString, "ncclGetErrorString");
  find(api.GetLastError, "ncclGetLastError");
  find(api.GetUniqueId, "ncclGetUniqueId");
  find(api.CommInitRank, "ncclCommInitRank");
  find(api.CommDestroy, "ncclCommDestroy");
  find(api.CommAbort, "ncclCommAbort");
  find(api.CommGetAsyncError, "ncclCommGetAsyncError");
  find(api.AllReduce, "ncclAllReduce");
  find(api.AllGather, "ncclAllGather");
  find(api.Send, "ncclSend");
  find(api.Recv, "ncclRecv");
  find(api.GroupStart, "ncclGroupStart");
  find(api.GroupEnd, "ncclGroupEnd");
  int version = 0;
  if (api.GetVersion != nullptr) api.GetVersion(&version);
  if (const auto fault = NcclDoesNotFit(version, missing))
    return absl::UnavailableError(fault->Line());
  return api;
}

}  // namespace

absl::StatusOr<const NcclApi*> OpenNccl() {
  static const absl::StatusOr<NcclApi>* const api = new absl::StatusOr<NcclApi>(Load());
  if (!api->ok()) return api->status();
  return &**api;
}

absl::Status NcclStatus(const NcclApi& nccl, ncclResult_t result, const char* what) {
  if (result == ncclSuccess) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("NCCL ", what, ": ", nccl.GetErrorString(result), " (",
                                             nccl.GetLastError(nullptr), ")"));
}

}  // namespace trireme
