// Bytes of the messages between ranks: same program, same machine type on both ends, so values are
// copied as they are. A message that does not parse is our own fault: CHECK.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/check.h"

namespace trireme {

class ByteWriter {
 public:
  // Writes into the memory of `reuse`, whose content is gone.
  explicit ByteWriter(std::string reuse = {}) : bytes_(std::move(reuse)) { bytes_.clear(); }
  template <typename T>
  requires std::is_trivially_copyable_v<T>
  void Put(const T& value) { bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T)); }
  template <typename T>
  requires std::is_trivially_copyable_v<T>
  void PutVector(const std::vector<T>& values) {
    Put(static_cast<uint64_t>(values.size()));
    bytes_.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  }
  void PutString(const std::string& value) {
    Put(static_cast<uint64_t>(value.size()));
    bytes_ += value;
  }
  std::string Take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

class ByteReader {
 public:
  explicit ByteReader(const std::string& bytes)
      : next_(bytes.data()), end_(bytes.data() + bytes.size()) {}
  template <typename T>
  requires std::is_trivially_copyable_v<T> T Get() {
    T value;
    std::memcpy(&value, Advance(sizeof(T)), sizeof(T));
    return value;
  }
  template <typename T>
  requires std::is_trivially_copyable_v<T> std::vector<T> GetVector() {
    std::vector<T> values;
    GetVector(&values);
    return values;
  }
  template <typename T>
  requires std::is_trivially_copyable_v<T>
  void GetVector(std::vector<T>* values) {
    const uint64_t count = Get<uint64_t>();
    CHECK_LE(count, static_cast<uint64_t>(end_ - next_) / sizeof(T));
    values->resize(count);
    if (count > 0) std::memcpy(values->data(), Advance(count * sizeof(T)), count * sizeof(T));
  }
  std::string GetString() {
    const uint64_t count = Get<uint64_t>();
    return std::string(Advance(count), count);
  }
  bool done() const { return next_ == end_; }

 private:
  const char* Advance(uint64_t bytes) {
    CHECK_LE(bytes, static_cast<uint64_t>(end_ - next_)) << "message too short";
    const char* at = next_;
    next_ += bytes;
    return at;
  }
  const char* next_;
  const char* end_;
};

}  // namespace trireme
