// The part of libsentencepiece that the tokenizer uses, in standard types: the library's header
// declares an absl::string_view of its own and cannot be included together with Abseil. Internal to
// the tokenizer.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace trireme {

class SentencePieceLibrary {
 public:
  enum class PieceKind { kNormal, kByte, kUnknown, kControl };

  // Null when `bytes` is no model.
  static std::unique_ptr<SentencePieceLibrary> Parse(const std::string& bytes);
  ~SentencePieceLibrary();

  int size() const;
  std::string Piece(int id) const;
  PieceKind Kind(int id) const;
  int bos_id() const;  // -1 = none
  int eos_id() const;
  // False, with the reason in `error`, when the library fails. REQUIRES: `text` is valid UTF-8.
  // Thread-safe.
  bool Encode(const std::string& text, std::vector<int>& ids, std::string& error) const;
  std::string Decode(int id) const;

 private:
  struct Impl;
  explicit SentencePieceLibrary(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace trireme
