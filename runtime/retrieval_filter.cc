#include "runtime/retrieval_filter.h"

#include <algorithm>
#include <cctype>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "models/json_file.h"

namespace trireme {
namespace {

class Parser {
 public:
  Parser(const std::string& text, const std::vector<std::string>& attributes)
      : text_(text), attributes_(attributes) {
    Advance();
  }

  absl::StatusOr<Filter> Parse() {
    Filter filter;
    if (kind_ == Kind::kEnd) return filter;
    for (;;) {
      filter.clauses.emplace_back();
      RETURN_IF_ERROR(Clause(&filter.clauses.back()));
      if (kind_ == Kind::kEnd) return filter;
      if (kind_ == Kind::kOr) return Malformed("an OR needs parentheses around its clause");
      if (kind_ != Kind::kAnd) return Malformed("expected & or the end");
      Advance();
    }
  }

 private:
  enum class Kind { kEnd, kAnd, kOr, kNot, kOpen, kClose, kName, kUnknown };

  static bool IsNameCharacter(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == ':' || c == '.' ||
           c == '/' || c == '-';
  }

  void Advance() {
    while (next_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[next_])) != 0)
      ++next_;
    begin_ = next_;
    if (next_ == text_.size()) {
      kind_ = Kind::kEnd;
      return;
    }
    const char c = text_[next_];
    if (IsNameCharacter(c)) {
      while (next_ < text_.size() && IsNameCharacter(text_[next_])) ++next_;
      name_ = text_.substr(begin_, next_ - begin_);
      kind_ = name_ == "AND"   ? Kind::kAnd
              : name_ == "OR"  ? Kind::kOr
              : name_ == "NOT" ? Kind::kNot
                               : Kind::kName;
      return;
    }
    ++next_;
    kind_ = c == '&'   ? Kind::kAnd
            : c == '|' ? Kind::kOr
            : c == '!' ? Kind::kNot
            : c == '(' ? Kind::kOpen
            : c == ')' ? Kind::kClose
                       : Kind::kUnknown;
  }

  absl::Status Clause(std::vector<Filter::Literal>* clause) {
    if (kind_ != Kind::kOpen) return Literal(clause);
    Advance();
    for (;;) {
      RETURN_IF_ERROR(Literal(clause));
      if (kind_ == Kind::kClose) break;
      if (kind_ == Kind::kAnd) return Malformed("a clause in parentheses is an OR; no & inside");
      if (kind_ != Kind::kOr) return Malformed("expected | or )");
      Advance();
    }
    Advance();
    return absl::OkStatus();
  }

  absl::Status Literal(std::vector<Filter::Literal>* clause) {
    Filter::Literal literal;
    if (kind_ == Kind::kNot) {
      literal.negated = true;
      Advance();
    }
    if (kind_ != Kind::kName) return Malformed("expected an attribute");
    const auto it = std::find(attributes_.begin(), attributes_.end(), name_);
    if (it == attributes_.end()) {
      return absl::NotFoundError(absl::StrCat("filter ", Quoted(text_), ": at position ",
                                              begin_ + 1, ": the table has no attribute ",
                                              Quoted(name_)));
    }
    literal.attribute = static_cast<int32_t>(it - attributes_.begin());
    clause->push_back(literal);
    Advance();
    return absl::OkStatus();
  }

  absl::Status Malformed(const char* what) const {
    return absl::InvalidArgumentError(
        absl::StrCat("filter ", Quoted(text_), ": at position ", begin_ + 1, ": ", what));
  }

  const std::string& text_;
  const std::vector<std::string>& attributes_;
  size_t begin_ = 0, next_ = 0;
  Kind kind_ = Kind::kEnd;
  std::string name_;
};

}  // namespace

absl::StatusOr<Filter> ParseFilter(const std::string& text,
                                   const std::vector<std::string>& attributes) {
  return Parser(text, attributes).Parse();
}

}  // namespace trireme
