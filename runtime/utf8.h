// UTF-8: validation, replacement of what is invalid, and single characters. Pure functions,
// thread-safe.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace trireme {

// Byte offset of the first byte that does not belong to a whole, valid character; npos when all of
// `text` is valid. Overlong forms, surrogates and code points above U+10FFFF are invalid.
size_t FindInvalidUtf8(std::string_view text);

// `text` with each maximal subpart of an invalid sequence replaced by one U+FFFD (Unicode 3.9, as
// in WHATWG decoders).
std::string ReplaceInvalidUtf8(std::string_view text);

// How many bytes at the end of `text` (0 to 3) begin a character that later bytes could still
// complete.
size_t IncompleteUtf8Suffix(std::string_view text);

// REQUIRES: `text` is valid UTF-8 and `offset` is the start of a character. Moves `offset` past the
// character.
char32_t NextUtf8(std::string_view text, size_t& offset);

// REQUIRES: code point <= U+10FFFF and no surrogate.
void AppendUtf8(char32_t code_point, std::string& out);

}  // namespace trireme
