// What parsing config.json is made of: typed reading of its fields, and the refusal of those whose
// maths the decoder does not have. Of models/config.cc alone.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "models/config.h"
#include "models/json_file.h"

namespace trireme {

// Typed access to the fields of one JSON object. The first problem is kept in status(), later reads
// give defaults, so that a parser can read all its fields and ask once.
class FieldReader {
 public:
  FieldReader(const nlohmann::json& object, std::string file, std::string prefix = "")
      : object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  const absl::Status& status() const { return status_; }
  void Update(const absl::Status& status) { status_.Update(status); }
  void Invalid(const std::string& field, const std::string& what) {
    Update(absl::InvalidArgumentError(absl::StrCat(file_, ": ", prefix_, field, ": ", what)));
  }
  void Unimplemented(const std::string& field, const std::string& what) {
    Update(absl::UnimplementedError(absl::StrCat(file_, ": ", prefix_, field, ": ", what)));
  }

  // The field, or null when it is absent or JSON null.
  const nlohmann::json* Find(const std::string& field) const {
    const auto it = object_.find(field);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  int64_t Int(const std::string& field, int64_t low, int64_t high,
              std::optional<int64_t> absent = std::nullopt) {
    const std::string right = absl::StrCat("must be an integer from ", low, " to ", high);
    const nlohmann::json* value = Find(field);
    if (value == nullptr) {
      if (!absent)
        Invalid(field, absl::StrCat(object_.contains(field) ? "is null; " : "is missing; ", right));
      return absent.value_or(low);
    }
    return IntOf(field, *value, low, high, right);
  }
  // One integer or a list of them; absent gives an empty list.
  std::vector<int64_t> Ints(const std::string& field, int64_t low, int64_t high) {
    const std::string right =
        absl::StrCat("must be an integer from ", low, " to ", high, " or a list of them");
    std::vector<int64_t> out;
    const nlohmann::json* value = Find(field);
    if (value == nullptr) return out;
    if (!value->is_array()) {
      out.push_back(IntOf(field, *value, low, high, right));
    } else {
      for (const nlohmann::json& item : *value) out.push_back(IntOf(field, item, low, high, right));
    }
    return out;
  }
  double Real(const std::string& field, double low, double high,
              std::optional<double> absent = std::nullopt) {
    const std::string right = absl::StrCat("must be a number from ", low, " to ", high);
    const nlohmann::json* value = Find(field);
    if (value == nullptr) {
      if (!absent)
        Invalid(field, absl::StrCat(object_.contains(field) ? "is null; " : "is missing; ", right));
      return absent.value_or(low);
    }
    if (!value->is_number()) {
      Invalid(field, absl::StrCat("is ", TypeOf(*value), "; ", right));
      return low;
    }
    const double number = value->get<double>();
    if (!(number >= low && number <= high)) {
      Invalid(field, absl::StrCat("is ", number, "; ", right));
      return low;
    }
    return number;
  }
  bool Bool(const std::string& field, bool absent) {
    const nlohmann::json* value = Find(field);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) {
      Invalid(field, absl::StrCat("is ", TypeOf(*value), "; must be true or false"));
      return absent;
    }
    return value->get<bool>();
  }
  std::string String(const std::string& field, const std::string& absent) {
    const nlohmann::json* value = Find(field);
    if (value == nullptr) return absent;
    if (!value->is_string()) {
      Invalid(field, absl::StrCat("is ", TypeOf(*value), "; must be a string"));
      return absent;
    }
    return value->get<std::string>();
  }

 private:
  int64_t IntOf(const std::string& field, const nlohmann::json& value, int64_t low, int64_t high,
                const std::string& right) {
    if (!value.is_number_integer()) {
      Invalid(field,
              absl::StrCat("is ", value.is_number() ? "a fraction" : TypeOf(value), "; ", right));
      return low;
    }
    if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{1} << 62) {
      Invalid(field, absl::StrCat("is ", value.get<uint64_t>(), "; ", right));
      return low;
    }
    const int64_t number = value.get<int64_t>();
    if (number < low || number > high) {
      Invalid(field, absl::StrCat("is ", number, "; ", right));
      return low;
    }
    return number;
  }

  const nlohmann::json& object_;
  std::string file_;
  std::string prefix_;
  absl::Status status_;
};

// Checkpoints of these architectures, or of models made from them, carry fields that change the
// maths and that we have no code for. What is read nowhere must not be there, or say what we do
// anyway: a field that is ignored makes a model that talks nonsense.

// Unimplemented when the field is a number other than `neutral` or true. Absent, null and false are
// always fine.
void CheckNeutral(FieldReader& in, const std::string& field, std::optional<double> neutral);
// The fields of one RoPE object, whose rope_type is `type`.
void CheckRopeFields(FieldReader& rope, const nlohmann::json& object, const std::string& type);
// Quantised weights, by any of the names that writers give them.
void CheckQuantization(FieldReader& in);
// All other fields. REQUIRES: what `config` has was read without an error.
void CheckOtherMaths(FieldReader& in, const ModelConfig& config);

}  // namespace trireme
