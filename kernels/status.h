// RETURN_IF_ERROR and ASSIGN_OR_RETURN over absl::Status. Status is for what the world does to us;
// its message is one clear line that names the file, flag, tensor or rank and what would be right.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define RETURN_IF_ERROR(expression)                                         \
  do {                                                                      \
    if (absl::Status status_ = (expression); !status_.ok()) return status_; \
  } while (false)

#define TRIREME_CONCAT_(a, b) a##b
#define TRIREME_CONCAT(a, b) TRIREME_CONCAT_(a, b)
#define TRIREME_ASSIGN_OR_RETURN_(result, target, expression) \
  auto result = (expression);                                 \
  if (!result.ok()) return std::move(result).status();        \
  target = std::move(result).value()
#define ASSIGN_OR_RETURN(target, expression) \
  TRIREME_ASSIGN_OR_RETURN_(TRIREME_CONCAT(result_, __LINE__), target, expression)
