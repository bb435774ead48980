#include "runtime/normalizer.h"

#include "kernels/status.h"
#include "runtime/nfc.h"

namespace trireme {

absl::Status ApplyReplace(const ReplaceStep& step, std::string& text) {
  std::vector<ByteRange> matches;
  RETURN_IF_ERROR(step.pattern.FindAll(text, matches));
  if (matches.empty()) return absl::OkStatus();
  std::string out;
  out.reserve(text.size() + matches.size() * step.content.size());
  size_t done = 0;
  for (const ByteRange& match : matches) {
    out.append(text, done, match.begin - done);
    out += step.content;
    done = match.end;
  }
  out.append(text, done, std::string::npos);
  text = std::move(out);
  return absl::OkStatus();
}

absl::Status Normalize(const std::vector<NormalizerStep>& steps, std::string& text) {
  for (const NormalizerStep& step : steps) {
    if (const auto* prepend = std::get_if<PrependStep>(&step)) {
      if (!text.empty()) text.insert(0, prepend->prefix);
    } else if (const auto* replace = std::get_if<ReplaceStep>(&step)) {
      RETURN_IF_ERROR(ApplyReplace(*replace, text));
    } else {
      text = ToNfc(std::move(text));
    }
  }
  return absl::OkStatus();
}

}  // namespace trireme
