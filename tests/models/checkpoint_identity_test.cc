#include "models/checkpoint_identity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "tests/testing.h"

namespace trireme {
namespace {

using testing::ElementsAre;
using testing::StartsWith;

class CheckpointIdentityTest : public testing::Test {
 protected:
  CheckpointIdentityTest() {
    std::filesystem::copy(GoldenModel("stories260K"), scratch_.path(),
                          std::filesystem::copy_options::recursive);
  }
  std::vector<std::string> Identity() const { return CheckpointIdentity(scratch_.path()); }
  // Writes a byte into the middle of a file, or at its end.
  void Damage(const std::string& name, int64_t offset) {
    std::fstream file(scratch_.path() + "/" + name,
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(offset);
    file.put('~');
  }
  ScratchDir scratch_;
};

TEST_F(CheckpointIdentityTest, IsTheSameForACopy) {
  EXPECT_EQ(Identity(), CheckpointIdentity(GoldenModel("stories260K")));
  EXPECT_THAT(Identity(),
              ElementsAre(StartsWith("config.json "), StartsWith("model.safetensors "),
                          StartsWith("tokenizer.json "), StartsWith("tokenizer.model ")));
}

TEST_F(CheckpointIdentityTest, SeesHeadersAndOtherWeights) {
  const std::vector<std::string> before = Identity();
  EXPECT_EQ(Identity(), before);
  Damage("model.safetensors", 40);
  const std::vector<std::string> other_header = Identity();
  EXPECT_NE(other_header[1], before[1]);
  EXPECT_EQ(other_header[0], before[0]);
  const std::string path = scratch_.path() + "/model.safetensors";
  Damage("model.safetensors", std::filesystem::file_size(path) - 1);
  EXPECT_NE(Identity()[1], other_header[1]) << "the last weight";
}

// Weights of another training: all differ, the header and the size do not.
TEST_F(CheckpointIdentityTest, SeesAnotherTraining) {
  const std::vector<std::string> before = Identity();
  const std::string path = scratch_.path() + "/model.safetensors";
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  uint64_t header = 0;
  file.read(reinterpret_cast<char*>(&header), sizeof(header));
  const uint64_t begin = header + sizeof(header), bytes = std::filesystem::file_size(path);
  std::string weights(bytes - begin, '\0');
  file.read(weights.data(), static_cast<std::streamsize>(weights.size()));
  for (char& byte : weights) byte = static_cast<char>(byte ^ 1);
  file.seekp(static_cast<std::streamoff>(begin));
  file.write(weights.data(), static_cast<std::streamsize>(weights.size()));
  file.close();
  EXPECT_NE(Identity()[1], before[1]);
}

TEST_F(CheckpointIdentityTest, SeesConfigTokenizerAndSizes) {
  std::vector<std::string> before = Identity();
  Damage("tokenizer.json", 10'000);
  EXPECT_NE(Identity()[2], before[2]);
  std::filesystem::resize_file(scratch_.path() + "/model.safetensors", 500'000);
  EXPECT_NE(Identity()[1], before[1]);
}

TEST_F(CheckpointIdentityTest, SurvivesWhatIsNoCheckpoint) {
  std::ofstream(scratch_.path() + "/model.safetensors") << "\xff\xff\xff\xff\xff\xff\xff\xff";
  std::ofstream(scratch_.path() + "/tiny.safetensors") << "x";
  EXPECT_EQ(Identity().size(), 5u);
  EXPECT_THAT(CheckpointIdentity(scratch_.path() + "/nowhere"), ElementsAre("-"));
}

}  // namespace
}  // namespace trireme
