#pragma once

namespace trireme {

// From now on an exception that nobody catches, on any thread, ends the job like a failed CHECK
// (kernels/check.h), with its text. For main().
void EndOnUncaughtExceptions();

}  // namespace trireme
