// CHECK family: for our own faults (broken invariants), never for the world's (files, flags,
// requests: those are absl::Status). A failed CHECK prints rank, host, file, line and expression in
// one line, runs the fatal handler and ends the process; `parallel/` installs a handler that ends
// the whole job. Callable from any thread. Abseil-free.
#pragma once

#include <sstream>
#include <string>

namespace trireme {

// Called once by Fatal() with the message after it is printed. Must not return normally into the
// failed code: Fatal() aborts the process if it does.
using FatalHandler = void (*)(const std::string& message);
void SetFatalHandler(FatalHandler handler);

FatalHandler CurrentFatalHandler();

// Shown in front of every fatal line, e.g. "rank 3 (node7)". Not thread-safe: set once at start-up.
void SetFatalPrefix(const std::string& prefix);
const std::string& FatalPrefix();

[[noreturn]] void Fatal(const char* file, int line, const std::string& message);

namespace check_internal {
// Collects `CHECK(x) << "why"` and ends the process when the full expression is over.
class FatalStream {
 public:
  FatalStream(const char* file, int line, const char* what) : file_(file), line_(line) {
    out_ << what;
  }
  [[noreturn]] ~FatalStream() { Fatal(file_, line_, out_.str()); }
  template <typename T>
  FatalStream& operator<<(const T& value) {
    out_ << value;
    return *this;
  }

 private:
  const char* file_;
  int line_;
  std::ostringstream out_;
};
}  // namespace check_internal
}  // namespace trireme

#define TRIREME_FATAL(what) ::trireme::check_internal::FatalStream(__FILE__, __LINE__, what)
#define CHECK(condition)      \
  if (condition) [[likely]] { \
  } else                      \
    TRIREME_FATAL("CHECK failed: " #condition " ")
#define TRIREME_CHECK_OP(a, op, b)                        \
  if ((a)op(b)) [[likely]] {                              \
  } else                                                  \
    TRIREME_FATAL("CHECK failed: " #a " " #op " " #b " ") \
        << "(" << (a) << " against " << (b) << ") "
#define CHECK_EQ(a, b) TRIREME_CHECK_OP(a, ==, b)
#define CHECK_NE(a, b) TRIREME_CHECK_OP(a, !=, b)
#define CHECK_LT(a, b) TRIREME_CHECK_OP(a, <, b)
#define CHECK_LE(a, b) TRIREME_CHECK_OP(a, <=, b)
#define CHECK_GT(a, b) TRIREME_CHECK_OP(a, >, b)
#define CHECK_GE(a, b) TRIREME_CHECK_OP(a, >=, b)
