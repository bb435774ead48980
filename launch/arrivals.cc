#include "launch/arrivals.h"

#include <sstream>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "launch/session.h"
#include "models/json_file.h"

namespace trireme {
namespace {

using Json = nlohmann::json;

constexpr double kLongestSeconds = 1e9;  // a clock of nanoseconds takes it

absl::Status Missing(const std::string& key) {
  return absl::InvalidArgumentError(absl::StrCat("needs \"", key, "\""));
}

absl::StatusOr<int64_t> Tokens(const Json& object, const std::string& key, int64_t max_model_len) {
  const auto value = object.find(key);
  if (value == object.end()) return Missing(key);
  // An unsigned value above INT64_MAX would turn negative.
  const bool integer = value->is_number_integer() && value->get<int64_t>() > 0;
  if (!integer) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", key, "\" is ", value->dump(), "; it must be a positive integer"));
  }
  if (value->get<int64_t>() > max_model_len) {
    return absl::InvalidArgumentError(absl::StrCat("\"", key, "\" is ", value->get<int64_t>(),
                                                   "; the model takes ", max_model_len,
                                                   " tokens (--max-model-len)"));
  }
  return value->get<int64_t>();
}

absl::StatusOr<RecordedArrival> ParseLine(const Json& object, double earliest,
                                          int64_t max_model_len) {
  for (const auto& [key, value] : object.items()) {
    if (key != "at" && key != "prompt_tokens" && key != "max_tokens")
      return absl::InvalidArgumentError(absl::StrCat(
          "unknown key \"", key, "\"; a line has \"at\", \"prompt_tokens\" and \"max_tokens\""));
  }
  const auto at = object.find("at");
  if (at == object.end()) return Missing("at");
  if (!at->is_number() || !(at->get<double>() >= 0.0 && at->get<double>() <= kLongestSeconds)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"at\" is ", at->dump(), "; it must be seconds since the run began, 0 to 1e9"));
  }
  RecordedArrival out{.at = at->get<double>()};
  if (out.at < earliest) {
    return absl::InvalidArgumentError(absl::StrCat("\"at\" is ", out.at, ", before the ", earliest,
                                                   " of the request above: sort the lines by it"));
  }
  ASSIGN_OR_RETURN(out.prompt_tokens, Tokens(object, "prompt_tokens", max_model_len));
  ASSIGN_OR_RETURN(out.max_tokens, Tokens(object, "max_tokens", max_model_len));
  if (out.prompt_tokens + out.max_tokens > max_model_len) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"prompt_tokens\" ", out.prompt_tokens, " and \"max_tokens\" ", out.max_tokens,
        ": the model takes ", max_model_len, " tokens of both together (--max-model-len)"));
  }
  return out;
}

}  // namespace

absl::StatusOr<std::vector<RecordedArrival>> ReadArrivals(const std::string& path,
                                                          int64_t max_model_len) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<RecordedArrival> out;
  std::istringstream in(text);
  std::string line;
  for (int64_t number = 1; std::getline(in, line); ++number) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty()) continue;
    const std::string where = absl::StrCat(path, ":", number);
    ASSIGN_OR_RETURN(const Json object, ParseJsonObject(line, where));
    const absl::StatusOr<RecordedArrival> arrival =
        ParseLine(object, out.empty() ? 0.0 : out.back().at, max_model_len);
    if (!arrival.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": ", std::string(arrival.status().message())));
    }
    out.push_back(*arrival);
  }
  if (out.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": holds no arrivals"));
  return out;
}

}  // namespace trireme
