#include "models/output_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <set>
#include <thread>

#include "models/output_directory.h"
#include "models/unfinished_path.h"
#include "tests/models/temp_dir.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

// Writes `text` to `path` and finishes.
absl::Status WriteWhole(const std::string& path, const std::string& text,
                        OutputFile::Sync sync = OutputFile::Sync::kNo) {
  const auto file = OutputFile::Create(path, sync);
  if (!file.ok()) return file.status();
  const absl::Status status = (*file)->Write(text.data(), static_cast<int64_t>(text.size()));
  return status.ok() ? (*file)->Finish() : status;
}

TEST(OutputFileTest, HasItsNameWhenItIsWhole) {
  TempDir dir;
  const std::string path = dir.Write("out", "old");
  for (const auto sync : {OutputFile::Sync::kNo, OutputFile::Sync::kYes}) {
    {
      const auto file = OutputFile::Create(path, sync);
      ASSERT_TRUE(file.ok()) << file.status();
      ASSERT_TRUE((*file)->Write("new", 3).ok());
      EXPECT_EQ(FileBytes(path), "old");
    }
    EXPECT_EQ(FileBytes(path), "old") << "abandoned";
    EXPECT_FALSE(fs::exists(path + ".partial"));
  }
  ASSERT_TRUE(WriteWhole(path, "new", OutputFile::Sync::kYes).ok());
  EXPECT_EQ(FileBytes(path), "new");
  EXPECT_FALSE(fs::exists(path + ".partial"));
}

TEST(OutputFileTest, DirectoryIsRefused) {
  TempDir dir;
  fs::create_directory(dir / "d");
  fs::create_directory_symlink(dir / "d", dir / "link");
  for (const std::string name : {"d", "d/", "link"}) {
    ExpectError(OutputFile::Create(dir / name).status(), absl::StatusCode::kInvalidArgument,
                (dir / name) + ": is a directory; name a file");
  }
  EXPECT_FALSE(fs::exists(dir / "d.partial"));
  EXPECT_EQ(std::string(OutputFile::Create(dir / "none/x").status().message()),
            (dir / "none/x") + ": cannot be written: No such file or directory");
}

// A link was replaced by a file, and what it named stayed as it was.
TEST(OutputFileTest, LinkStaysAndItsTargetIsReplaced) {
  TempDir dir;
  fs::create_directory(dir / "d");
  dir.Write("d/target", "old");
  fs::create_symlink("d/target", dir / "one");  // relative to where the link lies
  fs::create_symlink(dir / "one", dir / "two");
  fs::create_symlink("d/absent", dir / "dangling");
  ASSERT_TRUE(WriteWhole(dir / "two", "new").ok());
  EXPECT_TRUE(fs::is_symlink(dir / "one") && fs::is_symlink(dir / "two"));
  EXPECT_EQ(FileBytes(dir / "d/target"), "new");
  ASSERT_TRUE(WriteWhole(dir / "dangling", "made").ok());
  EXPECT_TRUE(fs::is_symlink(dir / "dangling"));
  EXPECT_EQ(FileBytes(dir / "d/absent"), "made");
  fs::create_symlink("loop", dir / "loop");
  EXPECT_EQ(std::string(OutputFile::Create(dir / "loop").status().message()),
            (dir / "loop") + ": cannot be written: Too many levels of symbolic links");
}

// A pipe, and /dev/stdout, were replaced by a file: who read them got nothing.
TEST(OutputFileTest, PipeIsWrittenTo) {
  TempDir dir;
  const std::string path = dir / "pipe";
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  fs::create_symlink("pipe", dir / "link");
  for (const std::string& name : {path, dir / "link"}) {
    std::string read;
    std::thread reader([&] { read = FileBytes(path); });
    const absl::Status status = WriteWhole(name, "through", OutputFile::Sync::kYes);
    reader.join();
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(read, "through");
  }
  EXPECT_TRUE(fs::is_fifo(path) && fs::is_symlink(dir / "link"));
  EXPECT_FALSE(fs::exists(path + ".partial"));
}

// An open pipe by its descriptor, as the shell's >(command) and /dev/stdout name it.
TEST(OutputFileTest, DescriptorIsWrittenTo) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const std::string path = "/dev/fd/" + std::to_string(ends[1]);
  ASSERT_TRUE(WriteWhole(path, "through").ok());
  close(ends[1]);
  char read_back[16] = {};
  EXPECT_EQ(read(ends[0], read_back, sizeof(read_back)), 7);
  close(ends[0]);
  EXPECT_STREQ(read_back, "through");
}

// Somebody's file under the working name is not written through a link.
TEST(OutputFileTest, LinkUnderTheWorkingNameIsRefused) {
  TempDir dir;
  dir.Write("precious", "kept");
  fs::create_symlink("precious", dir / "out.partial");
  EXPECT_FALSE(OutputFile::Create(dir / "out").ok());
  EXPECT_EQ(FileBytes(dir / "precious"), "kept");
}

// An interrupted command left 311 MB in a folder, which its next run refused as not empty.
TEST(OutputFileTest, InterruptedProcessLeavesWhatItFound) {
  TempDir dir;
  dir.Write("kept", "old");
  fs::create_directory(dir / "found");
  EXPECT_EXIT(
      {
        std::signal(SIGINT, [](int) {
          RemoveUnfinishedPaths();
          _exit(130);
        });
        ASSERT_TRUE(WriteWhole(dir / "done", "whole").ok());
        const auto made = OutputDirectory::Claim(dir / "made");
        const auto found = OutputDirectory::Claim(dir / "found");
        ASSERT_TRUE(WriteWhole((*made)->Add("shard-1"), "whole").ok());
        ASSERT_TRUE(WriteText((*found)->Add("index"), "whole").ok());
        const auto shard = OutputFile::Create((*made)->Add("shard-2"));
        const auto replaced = OutputFile::Create(dir / "kept");
        ASSERT_TRUE(shard.ok() && replaced.ok() && fs::exists(dir / "made/shard-2.partial"));
        // Used again after one that is done.
        { const auto abandoned = OutputFile::Create(dir / "abandoned"); }
        const auto another = OutputFile::Create(dir / "another");
        raise(SIGINT);
      },
      ::testing::ExitedWithCode(130), "");
  std::set<std::string> left;
  for (const auto& entry : fs::recursive_directory_iterator(dir.path()))
    left.insert(entry.path().filename());
  EXPECT_EQ(left, (std::set<std::string>{"done", "found", "kept"}));
  EXPECT_EQ(FileBytes(dir / "kept"), "old");
}

TEST(OutputFileTest, NothingIsBegunOnceInterrupted) {
  TempDir dir;
  EXPECT_EXIT(
      {
        RemoveUnfinishedPaths();
        const absl::Status status = OutputFile::Create(dir / "late").status();
        std::fprintf(stderr, "%s", std::string(status.message()).c_str());
        _exit(0);
      },
      ::testing::ExitedWithCode(0), "late: interrupted");
  EXPECT_TRUE(fs::is_empty(dir.path()));
}

TEST(OutputDirectoryTest, LeftoversOfAKilledAttemptAreReplaced) {
  TempDir dir;
  dir.Write("model-00001-of-00003.safetensors.partial", "half");
  {
    const auto out = OutputDirectory::Claim(dir.path());
    ASSERT_TRUE(out.ok()) << out.status();
    EXPECT_TRUE(fs::is_empty(dir.path()));
  }
  for (const std::string name : {"config.json", "partial", "x.partial.txt"}) {
    dir.Write("a.partial", "half");
    dir.Write(name, "");
    ExpectError(OutputDirectory::Claim(dir.path()).status(), absl::StatusCode::kAlreadyExists,
                dir.path() + ": is not empty; name a new or an empty directory");
    EXPECT_TRUE(fs::exists(dir / "a.partial"));
    fs::remove(dir / name);
  }
  fs::create_directory(dir / "folder.partial");
  EXPECT_FALSE(OutputDirectory::Claim(dir.path()).ok());
}

}  // namespace
}  // namespace trireme
