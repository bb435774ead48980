// What can lie where libtrireme_cuda.so is looked for: one line each, and no crash.

#include "kernels/cuda_module.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <string>

#include "absl/strings/match.h"
#include "tests/testing.h"

namespace trireme {
namespace {

std::string Bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

class CudaModuleTest : public ::testing::Test {
 protected:
  void ExpectRefused(const std::string& bytes, const std::string& why) {
    std::ofstream(path_, std::ios::binary) << bytes;
    const absl::Status status = OpenCudaModule(path_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    const std::string message(status.message());
    EXPECT_TRUE(absl::StartsWith(message, "--device cuda: " + path_ + " " + why)) << message;
    EXPECT_TRUE(absl::StrContains(message, ": copy it again from the build")) << message;
    EXPECT_FALSE(absl::StrContains(message, "\n")) << message;
  }
  const ScratchDir scratch_;
  const std::string path_ = scratch_.path() + "/libtrireme_cuda.so";
};

TEST_F(CudaModuleTest, OfTheSameBuildIsOpened) {
  const auto module = OpenCudaModule(TRIREME_MODULE_DOUBLE);
  ASSERT_TRUE(module.ok()) << module.status();
  EXPECT_NE(dlsym(*module, "trireme_cuda_identity"), nullptr);
}

TEST_F(CudaModuleTest, MissingIsABuildWithoutIt) {
  EXPECT_EQ(
      OpenCudaModule(path_).status().message(),
      "--device cuda: this build has no CUDA backend (" + path_ + " is missing); use --device cpu");
}

TEST_F(CudaModuleTest, TextIsRefused) {
  ExpectRefused("", "is no library: ");
  ExpectRefused("version https://git-lfs.github.com/spec/v1\n", "is no library: ");
  ExpectRefused(std::string(200, 'x'), "is no library: ");
}

// Loading such a file is a SIGBUS.
TEST_F(CudaModuleTest, HalfACopyIsRefused) {
  const std::string whole = Bytes(TRIREME_MODULE_DOUBLE);
  ASSERT_GT(whole.size(), 1000u);
  for (const size_t bytes : {size_t{64}, size_t{100}, whole.size() / 2, whole.size() - 1}) {
    ExpectRefused(whole.substr(0, bytes), "is not whole, " + std::to_string(bytes) + " of ");
  }
}

// Of this size, but no ELF of this machine.
TEST_F(CudaModuleTest, WhatTheLoaderRefusesIsToldInItsWords) {
  std::string other = Bytes(TRIREME_MODULE_DOUBLE);
  other[18] = other[19] = 0;  // e_machine
  ExpectRefused(other, "cannot be loaded (");
}

// Of the same version, perhaps, but with other virtual functions.
TEST_F(CudaModuleTest, OfAnotherBuildIsRefused) {
  ExpectRefused(Bytes(TRIREME_OTHER_MODULE_DOUBLE),
                "belongs to another build (0123456789ab) than this program (");
}

TEST_F(CudaModuleTest, ALibraryOfSomethingElseIsRefused) {
  ExpectRefused(Bytes(TRIREME_NO_MODULE_DOUBLE), "belongs to another build (without identity)");
}

}  // namespace
}  // namespace trireme
