#include "kernels/check.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace trireme {
namespace {
std::atomic<FatalHandler> g_handler{nullptr};
std::string& Prefix() {
  static std::string prefix;
  return prefix;
}
}  // namespace

void SetFatalHandler(FatalHandler handler) { g_handler.store(handler); }
FatalHandler CurrentFatalHandler() { return g_handler.load(); }
void SetFatalPrefix(const std::string& prefix) { Prefix() = prefix; }
const std::string& FatalPrefix() { return Prefix(); }

void Fatal(const char* file, int line, const std::string& message) {
  std::fprintf(stderr, "trireme: %s%s%s:%d: %s\n", Prefix().c_str(), Prefix().empty() ? "" : ": ",
               file, line, message.c_str());
  std::fflush(stderr);
  // Exchange, so that a CHECK that fails inside the handler does not run it again.
  if (FatalHandler handler = g_handler.exchange(nullptr)) handler(message);
  std::abort();
}

}  // namespace trireme
