#include "launch/prompts.h"

#include <algorithm>
#include <charconv>
#include <sstream>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "launch/session.h"
#include "models/json_file.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxTokens = int64_t{1} << 40;  // as --max-tokens

// Each gives what the value must be, and may leave `out` alone, when it is not of its kind; else
// nothing.
using Must = std::string;

template <typename T>
Must Integer(const Json& value, int64_t lowest, int64_t highest, T* out) {
  const Must must = absl::StrCat("a whole number from ", lowest, " to ", highest);
  if (!value.is_number_integer()) return must;
  // Unsigned values above INT64_MAX would turn negative.
  if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(highest))
    return must;
  const int64_t number = value.get<int64_t>();
  *out = static_cast<T>(number);
  return number >= lowest && number <= highest ? "" : must;
}
Must Seed(const Json& value, uint64_t* out) {
  if (!value.is_number_unsigned()) return absl::StrCat("a whole number from 0 to ", UINT64_MAX);
  *out = value.get<uint64_t>();
  return "";
}
Must Integers(const Json& value, std::vector<TokenId>* out) {
  const Must must = "an array of token ids";
  if (!value.is_array()) return must;
  for (const Json& element : value) {
    if (!Integer(element, 0, INT32_MAX, &out->emplace_back()).empty()) return must;
  }
  return "";
}
Must Number(const Json& value, float* out) {
  if (!value.is_number()) return "a number";
  *out = value.get<float>();
  return "";
}
Must Boolean(const Json& value, bool* out) {
  if (!value.is_boolean()) return "true or false";
  *out = value.get<bool>();
  return "";
}
Must Strings(const Json& value, std::vector<std::string>* out) {
  const Must must = "a string or an array of strings";
  out->clear();
  if (value.is_string()) out->push_back(value.get<std::string>());
  if (!value.is_array()) return value.is_string() ? "" : must;
  for (const Json& element : value) {
    if (!element.is_string()) return must;
    out->push_back(element.get<std::string>());
  }
  return "";
}

class Collector {
 public:
  Collector(const GenerateFlags& flags, const ModelConfig& config, const Tokenizer* tokenizer)
      : flags_(flags), config_(config), tokenizer_(tokenizer) {
    defaults_.max_tokens = flags.max_tokens;
    defaults_.sampling = flags.sampling;
    defaults_.stop = flags.stop;
    defaults_.n = flags.n;
    defaults_.priority = flags.priority;
  }

  absl::Status AddText(const std::string& where, const std::string& text, const Request& like,
                       bool ignore_eos) {
    if (tokenizer_ == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, ": ", flags_.model.model_dir,
                       " has no tokenizer.json or tokenizer.model; use --prompt-ids"));
    }
    absl::StatusOr<std::vector<TokenId>> ids = tokenizer_->Encode(text);
    if (!ids.ok())
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": ", std::string(ids.status().message())));
    if (ids->empty()) {
      return absl::InvalidArgumentError(absl::StrCat(
          where, ": the prompt is empty and the model has no BOS token to start from"));
    }
    return Add(where, *std::move(ids), text, like, ignore_eos);
  }

  absl::Status Add(const std::string& where, std::vector<TokenId> ids, const std::string& text,
                   const Request& like, bool ignore_eos) {
    if (ids.empty()) return absl::InvalidArgumentError(absl::StrCat(where, ": no token ids"));
    for (const TokenId id : ids) {
      if (id < 0 || id >= config_.vocab_size) {
        return absl::InvalidArgumentError(absl::StrCat(where, ": token id ", id,
                                                       " is outside the model's vocabulary (0 to ",
                                                       config_.vocab_size - 1, ")"));
      }
    }
    const int64_t limit =
        flags_.model.max_model_len > 0 ? flags_.model.max_model_len : config_.max_positions;
    if (static_cast<int64_t>(ids.size()) >= limit) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": the prompt has ", ids.size(),
                                                     " tokens; the model takes ", limit,
                                                     " with the output (--max-model-len)"));
    }
    if (!like.stop.empty() && tokenizer_ == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          where, ": stop strings need a tokenizer, and ", flags_.model.model_dir, " has none"));
    }
    for (const std::string& stop : like.stop) {
      if (stop.empty())
        return UsageError(absl::StrCat(where, ": a stop string is empty; leave it out instead"));
    }
    absl::Status sampling = CheckSamplingParams(like.sampling);
    if (!sampling.ok())
      return UsageError(absl::StrCat(where, ": ", std::string(sampling.message())));
    PromptRequest out{like, text, /*done=*/false};
    out.request.id = requests_.size();
    out.request.max_tokens = std::min(like.max_tokens, limit - static_cast<int64_t>(ids.size()));
    out.request.prompt = std::move(ids);
    if (!ignore_eos)
      out.request.stop_tokens.assign(config_.eos_token_ids.begin(), config_.eos_token_ids.end());
    requests_.push_back(std::move(out));
    return absl::OkStatus();
  }

  absl::Status AddJsonLine(const std::string& where, const std::string& line) {
    ASSIGN_OR_RETURN(const Json object, ParseJsonObject(line, where));
    Request like = defaults_;
    bool ignore_eos = flags_.ignore_eos;
    const Json* prompt = nullptr;
    std::vector<TokenId> ids;
    for (const auto& [key, value] : object.items()) {
      SamplingParams& s = like.sampling;
      bool known = true;
      Must must;
      if (key == "prompt")
        must = value.is_string() ? "" : "a string", prompt = &value;
      else if (key == "prompt_ids")
        must = Integers(value, &ids);
      else if (key == "max_tokens")
        must = Integer(value, 1, kMaxTokens, &like.max_tokens);
      else if (key == "n")
        must = Integer(value, 1, 1024, &like.n);
      else if (key == "priority")
        must = Integer(value, -1000, 1000, &like.priority);
      else if (key == "temperature")
        must = Number(value, &s.temperature);
      else if (key == "top_k")
        must = Integer(value, 0, INT32_MAX, &s.top_k);
      else if (key == "top_p")
        must = Number(value, &s.top_p);
      else if (key == "min_p")
        must = Number(value, &s.min_p);
      else if (key == "repetition_penalty")
        must = Number(value, &s.repetition_penalty);
      else if (key == "presence_penalty")
        must = Number(value, &s.presence_penalty);
      else if (key == "frequency_penalty")
        must = Number(value, &s.frequency_penalty);
      else if (key == "seed")
        must = Seed(value, &s.seed);
      else if (key == "logprobs")
        must = Integer(value, 0, kMaxLogprobs, &s.logprobs);
      else if (key == "ignore_eos")
        must = Boolean(value, &ignore_eos);
      else if (key == "stop")
        must = Strings(value, &like.stop);
      else
        known = false;
      if (!known)
        return absl::InvalidArgumentError(absl::StrCat(where, ": unknown key \"", key, "\""));
      if (!must.empty())
        return absl::InvalidArgumentError(absl::StrCat(where, ": \"", key, "\" must be ", must));
    }
    if ((prompt == nullptr) == ids.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": needs one of \"prompt\" and \"prompt_ids\", and not both"));
    }
    if (prompt != nullptr) return AddText(where, prompt->get<std::string>(), like, ignore_eos);
    return Add(where, std::move(ids), "", like, ignore_eos);
  }

  absl::Status AddFile(const std::string& path) {
    ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
    // Some editors put a byte order mark in front, which is no text.
    std::istringstream in(absl::StartsWith(text, "\xef\xbb\xbf") ? text.substr(3) : text);
    std::string line;
    const size_t before = requests_.size();
    for (int64_t number = 1; std::getline(in, line); ++number) {
      if (!line.empty() && line.back() == '\r') line.pop_back();
      if (line.empty()) continue;
      const std::string where = absl::StrCat(path, ":", number);
      RETURN_IF_ERROR(absl::EndsWith(path, ".jsonl")
                          ? AddJsonLine(where, line)
                          : AddText(where, line, defaults_, flags_.ignore_eos));
    }
    if (requests_.size() == before)
      return absl::InvalidArgumentError(absl::StrCat(path, ": holds no prompts"));
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<PromptRequest>> Collect() {
    for (const std::string& text : flags_.prompts) {
      RETURN_IF_ERROR(AddText("--prompt", text, defaults_, flags_.ignore_eos));
    }
    if (!flags_.prompts_file.empty()) RETURN_IF_ERROR(AddFile(flags_.prompts_file));
    for (const std::string& text : flags_.prompt_ids) {
      absl::StatusOr<std::vector<TokenId>> ids = ParseTokenIds("--prompt-ids", text);
      if (!ids.ok()) return UsageError(std::string(ids.status().message()));
      RETURN_IF_ERROR(Add("--prompt-ids", *std::move(ids), "", defaults_, flags_.ignore_eos));
    }
    return std::move(requests_);
  }

 private:
  const GenerateFlags& flags_;
  const ModelConfig& config_;
  const Tokenizer* tokenizer_;
  Request defaults_;
  std::vector<PromptRequest> requests_;
};

}  // namespace

absl::StatusOr<std::vector<TokenId>> ParseTokenIds(const std::string& what,
                                                   const std::string& text) {
  constexpr char kSeparators[] = ", \n\r\t[]";
  std::vector<TokenId> ids;
  size_t next = text.find_first_not_of(kSeparators);
  while (next != std::string::npos) {
    const size_t end = std::min(text.find_first_of(kSeparators, next), text.size());
    const char* const word = text.data() + next;
    TokenId id = -1;
    const auto [stopped_at, error] = std::from_chars(word, text.data() + end, id);
    if (error != std::errc() || stopped_at != text.data() + end || *word == '-') {
      const size_t line_begin = text.rfind('\n', next) + 1;  // 0 on the first line
      return absl::InvalidArgumentError(absl::StrCat(
          what, ": \"", absl::CHexEscape(text.substr(next, std::min<size_t>(end - next, 20))),
          "\" is not a token id (line ", 1 + std::count(text.begin(), text.begin() + next, '\n'),
          ", byte ", next - line_begin + 1, "); write them as 1,5,9"));
    }
    ids.push_back(id);
    next = text.find_first_not_of(kSeparators, end);
  }
  return ids;
}

absl::StatusOr<std::vector<PromptRequest>> CollectRequests(const GenerateFlags& flags,
                                                           const ModelConfig& config,
                                                           const Tokenizer* tokenizer) {
  return Collector(flags, config, tokenizer).Collect();
}

std::string SerializeRequests(const std::vector<PromptRequest>& requests) {
  ByteWriter out;
  out.Put(static_cast<uint64_t>(requests.size()));
  for (const auto& [request, text, done] : requests) {
    out.Put(request.id);
    out.PutVector(request.prompt);
    out.Put(request.sampling);
    out.Put(request.max_tokens);
    out.Put(request.n);
    out.Put(request.priority);
    out.PutVector(request.stop_tokens);
    out.Put(static_cast<uint64_t>(request.stop.size()));
    for (const std::string& stop : request.stop) out.PutString(stop);
    out.PutVector(request.output);
    out.PutString(text);
    out.Put(done);
  }
  return out.Take();
}

std::vector<PromptRequest> ParseRequests(const std::string& bytes) {
  ByteReader in(bytes);
  std::vector<PromptRequest> requests(in.Get<uint64_t>());
  for (auto& [request, text, done] : requests) {
    request.id = in.Get<uint64_t>();
    request.prompt = in.GetVector<TokenId>();
    request.sampling = in.Get<SamplingParams>();
    request.max_tokens = in.Get<int64_t>();
    request.n = in.Get<int32_t>();
    request.priority = in.Get<int32_t>();
    request.stop_tokens = in.GetVector<TokenId>();
    request.stop.resize(in.Get<uint64_t>());
    for (std::string& stop : request.stop) stop = in.GetString();
    request.output = in.GetVector<TokenId>();
    text = in.GetString();
    done = in.Get<bool>();
  }
  return requests;
}

}  // namespace trireme
