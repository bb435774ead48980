#include "models/safetensors.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <cstring>

#include "tests/models/temp_dir.h"

namespace trireme {
namespace {

// A file image: length, header, data.
std::string Image(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string out(reinterpret_cast<const char*>(&length), sizeof(length));
  return out + header + data;
}

std::string Error(const std::string& header, int64_t data_bytes) {
  const auto parsed = ParseSafetensorsHeader(header, 100, 100 + data_bytes, "f");
  EXPECT_TRUE(parsed.ok() || parsed.status().code() == absl::StatusCode::kInvalidArgument)
      << parsed.status();
  return std::string(parsed.status().message());
}

TEST(SafetensorsHeaderTest, Valid) {
  const auto header = ParseSafetensorsHeader(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28]},)"
      R"("a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"empty":{"dtype":"I64","shape":[0,7],"data_offsets":[4,4]},)"
      R"("scalar":{"dtype":"U8","shape":[],"data_offsets":[28,29]}}   )",
      100, 129, "f");
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->metadata.at("format"), "pt");
  ASSERT_EQ(header->tensors.size(), 4u);
  const TensorEntry& b = header->tensors.at("b");
  EXPECT_EQ(b.dtype, DType::kF32);
  EXPECT_EQ(b.dims, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(b.begin, 104);
  EXPECT_EQ(b.end, 128);
  EXPECT_TRUE(header->tensors.at("scalar").dims.empty());
}

TEST(SafetensorsHeaderTest, KnownForeignTypesAreKeptButMarked) {
  const auto header = ParseSafetensorsHeader(
      R"({"x":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,3]}})", 0, 3, "f");
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->tensors.at("x").foreign_dtype, "F8_E4M3");
  EXPECT_EQ(Error(R"({"x":{"dtype":"F64","shape":[3],"data_offsets":[0,3]}})", 3),
            "f: tensor \"x\": data_offsets span 3 bytes; shape and dtype need 24");
}

TEST(SafetensorsHeaderTest, EachFaultIsNamed) {
  const struct {
    const char* header;
    int64_t data_bytes;
    const char* line;
  } cases[] = {
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
       4, "f: has the key \"x\" twice in one object"},
      {R"({"x":{"dtype":"Q3","shape":[1],"data_offsets":[0,4]}})", 4,
       "f: tensor \"x\": unknown dtype \"Q3\""},
      {R"({"x":{"dtype":7,"shape":[1],"data_offsets":[0,4]}})", 4,
       "f: tensor \"x\": dtype must be a string"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4,
       "f: tensor \"x\": data_offsets span 4 bytes; shape and dtype need 8"},
      {R"({"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4,
       "f: tensor \"x\": shape must be a list of integers from 0 to 2^63 - 1"},
      {R"({"x":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", 4,
       "f: tensor \"x\": shape must be a list of integers from 0 to 2^63 - 1"},
      {R"({"x":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", 4,
       "f: tensor \"x\": shape must be a list of integers from 0 to 2^63 - 1"},
      {R"({"x":{"dtype":"F32","shape":[4611686018427387904,4,1],"data_offsets":[0,0]}})", 0,
       "f: tensor \"x\": the size of its shape overflows"},
      {R"({"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
       "f: tensor \"x\": the size of its shape overflows"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4,
       "f: tensor \"x\": data_offsets [4, 0] must be in order and within the 4 bytes of data; the "
       "file is cut short or "
       "its header is wrong"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,9223372036854775807]}})", 4,
       "f: tensor \"x\": data_offsets [0, 9223372036854775807] must be in order and within the 4 "
       "bytes of data; the file "
       "is cut short or its header is wrong"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4,
       "f: tensor \"x\": data_offsets must be two integers from 0 to 2^63 - 1"},
      {R"({"x":{"dtype":"F32","shape":[1]}})", 4,
       "f: tensor \"x\": must have exactly the fields dtype, shape and data_offsets"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}})", 4,
       "f: tensor \"x\": must have exactly the fields dtype, shape and data_offsets"},
      {R"({"x":[1]})", 4, "f: tensor \"x\": is an array; must be an object"},
      {R"({"__metadata__":{"a":1}})", 0, "f: __metadata__: must map strings to strings"},
      {R"({"__metadata__":[]})", 0, "f: __metadata__: must map strings to strings"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       8, "f: tensor \"y\": begins at data offset 4 where 8 is due: tensors overlap"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
       12, "f: tensor \"y\": begins at data offset 8 where 4 is due: there is a hole"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 5,
       "f: 1 bytes follow the last tensor; there must be none"},
      {R"([])", 0, "f: is an array; must be an object"},
  };
  for (const auto& c : cases) EXPECT_EQ(Error(c.header, c.data_bytes), c.line) << c.header;
}

TEST(SafetensorsFileTest, FaultsOfFiles) {
  TempDir dir;
  const auto error = [&](const std::string& bytes) {
    const std::string path = dir.Write("f.safetensors", bytes);
    const std::string message(SafetensorsFile::Open(path).status().message());
    EXPECT_TRUE(message.empty() || message.starts_with(path)) << message;
    return message.empty() ? message : message.substr(path.size());
  };
  const std::string header = R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  EXPECT_EQ(error(Image(header, "12345678")), "") << "valid";
  EXPECT_EQ(error(""), ": has 0 bytes; a safetensors file has at least 8");
  EXPECT_EQ(error(Image(header, "1234567")),
            ": tensor \"x\": data_offsets [0, 8] must be in order and within the 7 bytes of data; "
            "the file is cut short "
            "or its header is wrong");
  EXPECT_EQ(error(Image(header, "").substr(0, 30)),
            ": says its header has 54 bytes; at most 22 are possible: not a safetensors file, or "
            "cut short");
  EXPECT_EQ(error(std::string(8, '\xff') + header),
            ": says its header has 18446744073709551615 bytes; at most 54 are possible: not a "
            "safetensors file, or cut "
            "short");
  EXPECT_EQ(error(std::string(64, '\0')), ": is not valid JSON (at byte 1 of 0)");
  EXPECT_EQ(SafetensorsFile::Open(dir / "absent").status().code(), absl::StatusCode::kNotFound);
  ExpectError(SafetensorsFile::Open(dir.path()).status(), absl::StatusCode::kInvalidArgument,
              dir.path() + ": is not a regular file");
}

TEST(SafetensorsFileTest, FileThatBecomesShorterWhileOpen) {
  TempDir dir;
  const std::string path = dir.Write(
      "f", Image(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "12345678"));
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  std::filesystem::resize_file(path, 66);
  char bytes[8];
  ExpectError((*file)->Read(62, 8, bytes), absl::StatusCode::kDataLoss,
              path + ": ends at byte 66, 4 bytes early: the file became shorter while it was read");
}

TEST(SafetensorsWriterTest, RoundTrip) {
  TempDir dir;
  const std::string path = dir / "out.safetensors";
  const std::vector<float> a = {1.5f, -2.0f, 3.25f};
  const std::vector<int64_t> b = {7, -9};
  {
    auto writer = SafetensorsWriter::Create(path, {{"a", DType::kF32, {3}},
                                                   {"quote\"d", DType::kI64, {1, 2}},
                                                   {"none", DType::kBF16, {0, 5}}});
    ASSERT_TRUE(writer.ok()) << writer.status();
    ASSERT_TRUE((*writer)->Append(a.data(), 8).ok());
    ASSERT_TRUE((*writer)->Append(a.data() + 2, 4).ok());
    ASSERT_TRUE((*writer)->Append(b.data(), 16).ok());
    EXPECT_FALSE(std::filesystem::exists(path));
    ASSERT_TRUE((*writer)->Finish().ok());
  }
  EXPECT_FALSE(std::filesystem::exists(path + ".partial"));
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto& tensors = (*file)->header().tensors;
  ASSERT_EQ(tensors.size(), 3u);
  EXPECT_EQ(tensors.at("a").begin % 8, 0);
  EXPECT_EQ(tensors.at("none").dims, (std::vector<int64_t>{0, 5}));
  std::vector<float> a_read(3);
  std::vector<int64_t> b_read(2);
  ASSERT_TRUE((*file)->Read(tensors.at("a").begin, 12, a_read.data()).ok());
  ASSERT_TRUE((*file)->Read(tensors.at("quote\"d").begin, 16, b_read.data()).ok());
  EXPECT_EQ(a_read, a);
  EXPECT_EQ(b_read, b);
}

TEST(SafetensorsWriterTest, AbandonedFileLeavesNothing) {
  TempDir dir;
  {
    auto writer = SafetensorsWriter::Create(dir / "out", {{"a", DType::kF32, {3}}});
    ASSERT_TRUE(writer.ok()) << writer.status();
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(SafetensorsWriterTest, FileSizeLimitIsAnErrorThatNamesTheFile) {
  TempDir dir;
  signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  absl::Status status;
  {
    auto writer = SafetensorsWriter::Create(dir / "out", {{"a", DType::kU8, {1 << 20}}});
    ASSERT_TRUE(writer.ok()) << writer.status();
    const rlimit small{1 << 16, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    const std::string data(1 << 20, 'x');
    status = (*writer)->Append(data.data(), data.size());
    setrlimit(RLIMIT_FSIZE, &before);
  }
  EXPECT_EQ(std::string(status.message()), (dir / "out") + ": writing: File too large");
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(SafetensorsFileTest, GoldenFiles) {
  for (const char* model : {"stories260K", "tiny-llama3", "tiny-qwen2", "tiny-qwen3",
                            "tiny-mistral-swa", "tiny-starcoder2"}) {
    for (const char* name : {"/model.safetensors", "/golden/logits.safetensors"}) {
      const auto file = SafetensorsFile::Open(GoldenDir(model) + name);
      ASSERT_TRUE(file.ok()) << file.status();
      EXPECT_GT((*file)->header().tensors.size(), 5u);
    }
  }
}

}  // namespace
}  // namespace trireme
