// Unicode normalisation form C (canonical composition). Pure function, thread-safe.
#pragma once

#include <string>

namespace trireme {

// REQUIRES: `text` is valid UTF-8. Tables are those of Unicode 14; characters assigned later are
// left as they are.
std::string ToNfc(std::string text);

}  // namespace trireme
