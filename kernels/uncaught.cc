#include "kernels/uncaught.h"

#include <exception>
#include <string>

#include "kernels/check.h"

namespace trireme {
namespace {

[[noreturn]] void EndByException() {
  std::string what = "of an unknown type";
  try {
    if (const std::exception_ptr exception = std::current_exception())
      std::rethrow_exception(exception);
  } catch (const std::exception& exception) {
    what = exception.what();
  } catch (...) {
  }
  Fatal(__FILE__, __LINE__, "uncaught exception: " + what);
}

}  // namespace

void EndOnUncaughtExceptions() { std::set_terminate(&EndByException); }

}  // namespace trireme
