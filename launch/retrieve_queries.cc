#include "launch/retrieve_queries.h"

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "models/json_file.h"
#include "runtime/retrieval_source.h"

namespace trireme {
namespace {

constexpr int64_t kMaxQueryFile = int64_t{4} << 30;

absl::StatusOr<RetrievalQuery> ParseQuery(const std::string& line, const std::string& where) {
  ASSIGN_OR_RETURN(const nlohmann::json object, ParseJsonObject(line, where));
  RetrievalQuery query;
  for (const auto& [key, value] : object.items()) {
    const auto invalid = [&, &key = key](const char* what) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": ", Quoted(key), what));
    };
    const auto all = [&value = value](bool (nlohmann::json::*is)() const noexcept) {
      if (!value.is_array()) return false;
      for (const nlohmann::json& item : value) {
        if (!(item.*is)()) return false;
      }
      return true;
    };
    if (key == "embedding") {
      if (!all(&nlohmann::json::is_number)) return invalid(" must be a list of numbers");
      query.embedding = value.get<std::vector<float>>();
    } else if (key == "user_id") {
      if (!value.is_number_integer()) return invalid(" must be an integer");
      query.user_id = value.get<int64_t>();
    } else if (key == "filter") {
      if (!value.is_string()) return invalid(" must be a string");
      query.filter = value.get<std::string>();
    } else if (key == "exclude_ids") {
      if (!all(&nlohmann::json::is_number_integer)) return invalid(" must be a list of integers");
      query.exclude_ids = value.get<std::vector<int64_t>>();
    } else {
      return invalid(" is no field of a query");
    }
  }
  return query;
}

absl::StatusOr<QueryFile> ReadLines(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxQueryFile));
  QueryFile file;
  bool any = false;
  size_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    absl::StatusOr<RetrievalQuery> query = ParseQuery(line, absl::StrCat(path, ":", number));
    file.statuses.push_back(query.status());
    any = any || query.ok();
    file.queries.push_back(query.ok() ? *std::move(query) : RetrievalQuery());
  }
  if (!any && !file.queries.empty()) return file.statuses[0];
  return file;
}

}  // namespace

absl::StatusOr<QueryFile> ReadQueries(const std::string& path) {
  if (absl::EndsWith(path, ".jsonl")) return ReadLines(path);
  ASSIGN_OR_RETURN(const std::unique_ptr<EmbeddingFile> embeddings,
                   EmbeddingFile::Open(path, EmbeddingFile::Kind::kQueries));
  if (embeddings->dim() == 0 && embeddings->rows() > 0)
    return absl::InvalidArgumentError(path + ": its queries have no elements");
  QueryFile file;
  file.queries.resize(embeddings->rows());
  file.statuses.resize(embeddings->rows());
  for (int64_t b = 0; b < embeddings->rows(); ++b) {
    RetrievalQuery& query = file.queries[b];
    query.embedding.resize(embeddings->dim());
    RETURN_IF_ERROR(embeddings->ReadRows(b, 1, query.embedding.data()));
    if (embeddings->has_ids()) RETURN_IF_ERROR(embeddings->ReadIds(b, 1, &query.user_id));
  }
  return file;
}

absl::StatusOr<RowFlags> ReadRowFlags(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string bytes, ReadTextFile(path, kMaxQueryFile));
  ASSIGN_OR_RETURN(const NpyHeader header, ParseNpyHeader(bytes, path));
  if ((header.descr != "|b1" && header.descr != "|u1") || header.shape.size() != 1 ||
      header.shape[0] > static_cast<int64_t>(bytes.size()) - header.data_offset) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": must be a vector of bool or uint8, one for each item of the file"));
  }
  RowFlags flags;
  flags.count = header.shape[0];
  flags.bits.resize((flags.count + 31) / 32);
  for (int64_t i = 0; i < flags.count; ++i) {
    if (bytes[header.data_offset + i] != 0) flags.bits[i / 32] |= 1u << (i % 32);
  }
  return flags;
}

}  // namespace trireme
