#include "runtime/sentencepiece_library.h"

#include <sentencepiece_processor.h>

#include <exception>
#include <utility>

namespace trireme {

struct SentencePieceLibrary::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

SentencePieceLibrary::SentencePieceLibrary(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SentencePieceLibrary::~SentencePieceLibrary() = default;

std::unique_ptr<SentencePieceLibrary> SentencePieceLibrary::Parse(const std::string& bytes) try {
  auto impl = std::make_unique<Impl>();
  if (!impl->processor.LoadFromSerializedProto(bytes).ok()) return nullptr;
  return std::unique_ptr<SentencePieceLibrary>(new SentencePieceLibrary(std::move(impl)));
} catch (const std::exception&) {
  return nullptr;
}

int SentencePieceLibrary::size() const { return impl_->processor.GetPieceSize(); }
std::string SentencePieceLibrary::Piece(int id) const { return impl_->processor.IdToPiece(id); }
int SentencePieceLibrary::bos_id() const { return impl_->processor.bos_id(); }
int SentencePieceLibrary::eos_id() const { return impl_->processor.eos_id(); }

SentencePieceLibrary::PieceKind SentencePieceLibrary::Kind(int id) const {
  if (impl_->processor.IsByte(id)) return PieceKind::kByte;
  if (impl_->processor.IsUnknown(id)) return PieceKind::kUnknown;
  if (impl_->processor.IsControl(id)) return PieceKind::kControl;
  return PieceKind::kNormal;
}

bool SentencePieceLibrary::Encode(const std::string& text, std::vector<int>& ids,
                                  std::string& error) const try {
  const auto status = impl_->processor.Encode(text, &ids);
  if (!status.ok()) error = status.ToString();
  return status.ok();
} catch (const std::exception& e) {
  error = e.what();
  return false;
}

std::string SentencePieceLibrary::Decode(int id) const try {
  return impl_->processor.DecodeIds({id});
} catch (const std::exception&) {
  return "";
}

}  // namespace trireme
