#include "launch/output_files.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "absl/strings/match.h"
#include "tests/models/temp_dir.h"

namespace trireme {
namespace {

void ExpectRefused(const absl::Status& status, absl::StatusCode code, const std::string& why) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), why)) << status;
}

TEST(OutputFilesTest, WhatCanBeWrittenIsTakenAndNotCreated) {
  const TempDir dir;
  const std::string old = dir.Write("old.json", "{}");
  EXPECT_TRUE(CheckOutputFiles({{"--save", dir / "new.json"}, {"--trace", old}, {"--metrics", ""}},
                               {{"--prompts", ""}, {"--items", dir / "items.npy"}}, dir.path())
                  .ok());
  EXPECT_FALSE(std::filesystem::exists(dir / "new.json"));
  EXPECT_EQ(FileBytes(old), "{}");
  EXPECT_TRUE(CheckOutputFiles({{"--save", "/dev/null"}, {"--trace", "/dev/null"}},
                               {{"--prompts", "/dev/null"}}, "")
                  .ok());
}

TEST(OutputFilesTest, FoldersAndMissingFoldersAreRefused) {
  const TempDir dir;
  ExpectRefused(CheckOutputFiles({{"--save", dir.path()}}, {}, ""), absl::StatusCode::kUnavailable,
                "--save " + dir.path() + ": cannot be written: Is a directory");
  ExpectRefused(CheckOutputFiles({{"--save", dir / "nowhere/x"}}, {}, ""),
                absl::StatusCode::kUnavailable, "cannot be written: No such file");
}

TEST(OutputFilesTest, AnInputIsNotOverwrittenUnderAnyName) {
  const TempDir dir;
  const std::string input = dir.Write("queries.jsonl", "x");
  std::filesystem::create_symlink(input, dir / "link");
  std::filesystem::create_hard_link(input, dir / "hard");
  for (const std::string& name : {input, dir / "./queries.jsonl", dir / "link", dir / "hard"}) {
    ExpectRefused(CheckOutputFiles({{"--out", name}}, {{"--queries", input}}, ""),
                  absl::StatusCode::kInvalidArgument,
                  "--out " + name + ": is the file of --queries too and would be lost");
  }
}

TEST(OutputFilesTest, TwoOutputsAreTwoFiles) {
  const TempDir dir;
  ExpectRefused(CheckOutputFiles({{"--metrics", dir / "new"}, {"--trace", dir / "./new"}}, {}, ""),
                absl::StatusCode::kInvalidArgument, "is the file of --metrics too");
}

TEST(OutputFilesTest, FilesOfTheModelAreNotOverwritten) {
  const TempDir dir;
  for (const std::string name :
       {"config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors"}) {
    ExpectRefused(CheckOutputFiles({{"--trace", dir.Write(name, "x")}}, {}, dir.path()),
                  absl::StatusCode::kInvalidArgument, "is a file of the model");
  }
  EXPECT_TRUE(CheckOutputFiles({{"--trace", dir.Write("trace.json", "x")}}, {}, dir.path()).ok());
}

}  // namespace
}  // namespace trireme
