#include "runtime/pattern.h"

#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace trireme {
namespace {

// A pattern comes from a file and a text from a request: neither may hang the process. Real
// pre-split patterns need a few steps per character.
constexpr uint32_t kMatchLimit = 2'000'000;
constexpr uint32_t kHeapLimitKib = 64 * 1024;
constexpr size_t kMaxPatternBytes = 16 * 1024;

std::string Message(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof(text));
  return reinterpret_cast<const char*>(text);
}

template <auto free_function>
struct Free {
  template <typename T>
  void operator()(T* p) const {
    free_function(p);
  }
};
using MatchData = std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Free<pcre2_match_context_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context, Free<pcre2_compile_context_free>>;

}  // namespace

struct Pattern::Compiled {
  std::unique_ptr<pcre2_code, Free<pcre2_code_free>> code;
  MatchContext limits;

  // Number of pairs found (0 = none) or a PCRE2 error. The JIT has a small stack of its own; the
  // interpreter, which has not, takes over where that is too small.
  int Match(const std::string& text, size_t start, pcre2_match_data* data) const {
    const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    int found = pcre2_match(code.get(), subject, text.size(), start, PCRE2_NO_UTF_CHECK, data,
                            limits.get());
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) {
      found = pcre2_match(code.get(), subject, text.size(), start,
                          PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data, limits.get());
    }
    return found;
  }
};

Pattern Pattern::Literal(std::string text) {
  Pattern pattern;
  pattern.literal_ = std::move(text);
  return pattern;
}

absl::StatusOr<Pattern> Pattern::Regex(const std::string& source) {
  CompileContext context(pcre2_compile_context_create(nullptr));
  pcre2_set_max_pattern_length(context.get(), kMaxPatternBytes);
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto compiled = std::make_shared<Compiled>();
  compiled->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(source.data()), source.size(),
                                     PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error,
                                     &offset, context.get()));
  if (compiled->code == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("is no regular expression: ", Message(error), " at byte ", offset));
  }
  pcre2_jit_compile(compiled->code.get(),
                    PCRE2_JIT_COMPLETE);  // without it matching is only slower
  compiled->limits.reset(pcre2_match_context_create(nullptr));
  pcre2_set_match_limit(compiled->limits.get(), kMatchLimit);
  pcre2_set_heap_limit(compiled->limits.get(), kHeapLimitKib);
  Pattern pattern;
  pattern.regex_ = std::move(compiled);
  return pattern;
}

absl::Status Pattern::FindAll(const std::string& text, std::vector<ByteRange>& matches) const {
  matches.clear();
  if (regex_ == nullptr) {
    if (literal_.empty()) return absl::OkStatus();
    for (size_t at = text.find(literal_); at != std::string::npos;
         at = text.find(literal_, at + literal_.size())) {
      matches.push_back({at, at + literal_.size()});
    }
    return absl::OkStatus();
  }
  MatchData data(pcre2_match_data_create(1, nullptr));
  const PCRE2_SIZE* pair = pcre2_get_ovector_pointer(data.get());
  size_t start = 0;
  while (true) {
    const int found = regex_->Match(text, start, data.get());
    if (found == PCRE2_ERROR_NOMATCH) return absl::OkStatus();
    // Zero pairs fit when the pattern has groups: the first, all we want, is there all the same.
    if (found < 0) {
      return absl::ResourceExhaustedError(
          absl::StrCat("splitting the text at byte ", start, " failed: ", Message(found)));
    }
    // \K can move the begin of a match; a begin before the last end or after the own end is of no
    // use.
    if (pair[0] < start || pair[1] < pair[0]) {
      return absl::InvalidArgumentError("a split pattern matches backwards; it must not use \\K");
    }
    matches.push_back({pair[0], pair[1]});
    start = pair[1];

    if (pair[0] != pair[1]) continue;
    if (start == text.size()) return absl::OkStatus();
    // After an empty match the next one must begin a character further on.
    do ++start;
    while (start < text.size() && (text[start] & 0xC0) == 0x80);
  }
}

}  // namespace trireme
