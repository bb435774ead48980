// A directory that lives as long as the object, and small files in it.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "absl/status/status.h"

namespace trireme {

class TempDir {
 public:
  TempDir() {
    std::string pattern = ::testing::TempDir() + "/trireme_XXXXXX";
    path_ = mkdtemp(pattern.data());
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  std::string Write(const std::string& name, const std::string& bytes) const {
    std::ofstream(*this / name, std::ios::binary) << bytes;
    return *this / name;
  }

 private:
  std::string path_;
};

inline std::string FileBytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

inline std::string GoldenDir(const std::string& model) {
  return std::string(TRIREME_SOURCE_DIR) +
         (model == "stories260K" ? "/examples/models/" : "/tests/golden/") + model;
}

// Status has the code and exactly this line.
inline void ExpectError(const absl::Status& status, absl::StatusCode code,
                        const std::string& line) {
  EXPECT_EQ(std::string(status.message()), line);
  EXPECT_EQ(status.code(), code) << status;
}

}  // namespace trireme
