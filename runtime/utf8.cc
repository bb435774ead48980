#include "runtime/utf8.h"

#include <cstdint>
#include <cstring>

namespace trireme {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

struct Scan {
  size_t bytes;    // length of the character, or of the maximal subpart when it is not one
  bool valid;      // a whole character
  bool cut_short;  // not one, but only because the text ends
};

// The range of the second byte is what keeps overlong forms, surrogates and too large values out
// (Unicode table 3-7).
Scan ScanCharacter(std::string_view text, size_t offset) {
  auto byte = [&](size_t i) { return static_cast<unsigned char>(text[offset + i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {1, true, false};
  if (lead < 0xC2 || lead > 0xF4) return {1, false, false};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  unsigned char low = 0x80, high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (size_t i = 1; i < length; ++i) {
    if (offset + i == text.size()) return {i, false, true};
    if (byte(i) < low || byte(i) > high) return {i, false, false};
    low = 0x80;
    high = 0xBF;
  }
  return {length, true, false};
}

}  // namespace

size_t FindInvalidUtf8(std::string_view text) {
  size_t offset = 0;
  while (offset < text.size()) {
    uint64_t eight;
    if (text.size() - offset >= sizeof(eight)) {
      std::memcpy(&eight, text.data() + offset, sizeof(eight));
      if ((eight & 0x8080808080808080u) == 0) {
        offset += sizeof(eight);
        continue;
      }
    }
    const Scan scan = ScanCharacter(text, offset);
    if (!scan.valid) return offset;
    offset += scan.bytes;
  }
  return std::string_view::npos;
}

std::string ReplaceInvalidUtf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (true) {
    const size_t invalid = FindInvalidUtf8(text);
    out.append(text.substr(0, invalid));
    if (invalid == std::string_view::npos) return out;
    out.append(kReplacement);
    text.remove_prefix(invalid + ScanCharacter(text, invalid).bytes);
  }
}

size_t IncompleteUtf8Suffix(std::string_view text) {
  for (size_t bytes = 1; bytes <= 3 && bytes <= text.size(); ++bytes) {
    const unsigned char byte = static_cast<unsigned char>(text[text.size() - bytes]);
    if ((byte & 0xC0) == 0x80) continue;
    const Scan scan = ScanCharacter(text, text.size() - bytes);
    return scan.cut_short && scan.bytes == bytes ? bytes : 0;
  }
  return 0;
}

char32_t NextUtf8(std::string_view text, size_t& offset) {
  auto next = [&] { return static_cast<unsigned char>(text[offset++]); };
  const char32_t lead = next();
  if (lead < 0x80) return lead;
  const int more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
  char32_t code_point = lead & (0x3F >> more);
  for (int i = 0; i < more; ++i) code_point = (code_point << 6) | (next() & 0x3F);
  return code_point;
}

void AppendUtf8(char32_t code_point, std::string& out) {
  auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((code_point >> shift) & 0x3F)); };
  if (code_point < 0x80) {
    out += static_cast<char>(code_point);
  } else if (code_point < 0x800) {
    out += static_cast<char>(0xC0 | (code_point >> 6));
    tail(0);
  } else if (code_point < 0x10000) {
    out += static_cast<char>(0xE0 | (code_point >> 12));
    tail(6), tail(0);
  } else {
    out += static_cast<char>(0xF0 | (code_point >> 18));
    tail(12), tail(6), tail(0);
  }
}

}  // namespace trireme
