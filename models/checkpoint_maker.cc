#include "models/checkpoint_maker.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <future>
#include <map>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "models/json_file.h"
#include "models/memory_plan.h"
#include "models/output_directory.h"
#include "models/weights.h"

namespace trireme {
namespace {

constexpr int64_t kChunkBytes = 4 << 20;
constexpr double kStddev = 0.02;

// Element n of stream `seed`: a counter-based generator, so that any part of a tensor can be made
// on its own (splitmix64).
uint64_t RandomBits(uint64_t seed, uint64_t n) {
  uint64_t z = seed + (n + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// 2^16 normal values of one standard deviation in the stored type: 16 random bits pick a weight, so
// that making weights costs a hash for four of them and a lookup each (the table, 128 or 256 KiB,
// lives in the second-level cache).
class NormalTable {
 public:
  NormalTable(DType dtype, double stddev) : dtype_(dtype), bytes_(kEntries * SizeOf(dtype)) {
    for (uint64_t i = 0; i < kEntries; i += 2) {
      const double u = (static_cast<double>(RandomBits(1, i) >> 11) + 0.5) * 0x1p-53;
      const double angle =
          static_cast<double>(RandomBits(2, i) >> 11) * 0x1p-53 * 2.0 * std::numbers::pi;
      const double radius = stddev * std::sqrt(-2.0 * std::log(u));
      Set(i, radius * std::cos(angle));
      Set(i + 1, radius * std::sin(angle));
    }
  }
  // Elements [first, first + count) of the stream. REQUIRES: first and count are multiples of 4.
  void Fill(uint64_t seed, int64_t first, int64_t count, char* out) const {
    if (SizeOf(dtype_) == 2) {
      FillAs<uint16_t>(seed, first, count, out);
    } else {
      FillAs<uint32_t>(seed, first, count, out);
    }
  }

 private:
  static constexpr uint64_t kEntries = 1 << 16;

  void Set(uint64_t i, double value) {
    char* at = bytes_.data() + i * SizeOf(dtype_);
    const auto x = static_cast<float>(value);
    const BF16 bf16 = FromFloat<BF16>(x);
    const F16 f16 = FromFloat<F16>(x);
    if (dtype_ == DType::kF32) std::memcpy(at, &x, sizeof(x));
    if (dtype_ == DType::kBF16) std::memcpy(at, &bf16, sizeof(bf16));
    if (dtype_ == DType::kF16) std::memcpy(at, &f16, sizeof(f16));
  }
  template <typename Word>
  void FillAs(uint64_t seed, int64_t first, int64_t count, char* out) const {
    const auto* table = reinterpret_cast<const Word*>(bytes_.data());
    auto* words = reinterpret_cast<Word*>(out);
    for (int64_t i = 0; i < count; i += 4) {
      const uint64_t bits = RandomBits(seed, static_cast<uint64_t>(first + i) / 4);
      words[i] = table[bits & 0xffff];
      words[i + 1] = table[bits >> 16 & 0xffff];
      words[i + 2] = table[bits >> 32 & 0xffff];
      words[i + 3] = table[bits >> 48];
    }
  }

  DType dtype_;
  std::vector<char> bytes_;
};

// What the elements of one tensor are.
struct Content {
  const NormalTable* normal = nullptr;  // null: all ones
  uint64_t seed = 0;
};

// Writes the chunks of a checkpoint: one thread makes the next chunk while this one writes the
// last.
class TensorStream {
 public:
  TensorStream(DType dtype, int64_t total_bytes, const CheckpointProgress& progress)
      : dtype_(dtype), total_bytes_(total_bytes), progress_(progress) {
    for (auto& buffer : buffers_) buffer.resize(kChunkBytes);
  }
  absl::Status Write(const Content& content, int64_t elements, SafetensorsWriter& writer) {
    const auto size = static_cast<int64_t>(SizeOf(dtype_));
    const int64_t chunk = kChunkBytes / size;
    Make(content, 0, std::min(chunk, elements), 0);
    for (int64_t done = 0, turn = 0; done < elements; done += chunk, turn ^= 1) {
      const int64_t next = done + chunk;
      std::future<void> making;
      if (next < elements) {
        making = std::async(
            [&, next] { Make(content, next, std::min(chunk, elements - next), turn ^ 1); });
      }
      const int64_t bytes = std::min(chunk, elements - done) * size;
      const absl::Status status = writer.Append(buffers_[turn].data(), bytes);
      if (making.valid()) making.wait();
      RETURN_IF_ERROR(status);
      done_bytes_ += bytes;
      if (progress_) progress_(done_bytes_, total_bytes_);
    }
    return absl::OkStatus();
  }

 private:
  void Make(const Content& content, int64_t first, int64_t count, int64_t turn) {
    char* out = buffers_[turn].data();
    if (content.normal != nullptr) {
      content.normal->Fill(content.seed, first, (count + 3) / 4 * 4, out);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      if (dtype_ == DType::kF32) reinterpret_cast<float*>(out)[i] = 1.0f;
      if (dtype_ == DType::kBF16) reinterpret_cast<BF16*>(out)[i] = FromFloat<BF16>(1.0f);
      if (dtype_ == DType::kF16) reinterpret_cast<F16*>(out)[i] = FromFloat<F16>(1.0f);
    }
  }

  DType dtype_;
  int64_t total_bytes_;
  int64_t done_bytes_ = 0;
  const CheckpointProgress& progress_;
  std::vector<char> buffers_[2];
};

// Consecutive specs that fill a shard.
std::vector<std::vector<WeightSpec>> PlanShards(const std::vector<WeightSpec>& specs, DType dtype,
                                                int64_t max_bytes) {
  std::vector<std::vector<WeightSpec>> shards;
  int64_t bytes = 0;
  for (const WeightSpec& spec : specs) {
    const int64_t size = spec.shape.elements() * static_cast<int64_t>(SizeOf(dtype));
    if (shards.empty() || bytes + size > max_bytes) {
      shards.emplace_back();
      bytes = 0;
    }
    shards.back().push_back(spec);
    bytes += size;
  }
  return shards;
}

// The contents of the tensors of one model: tables are shared by all tensors of a standard
// deviation.
class Contents {
 public:
  Contents(DType dtype, int64_t layers, uint64_t seed)
      : plain_(dtype, kStddev),
        residual_(dtype, kStddev / std::sqrt(2.0 * static_cast<double>(layers))),
        seed_(RandomBits(0, seed)) {}
  Content Of(const WeightSpec& spec) {
    if (spec.name.ends_with("norm.weight")) return {};
    const bool residual = spec.name.find(".o_proj.") != std::string::npos ||
                          spec.name.find(".down_proj.") != std::string::npos ||
                          spec.name.find(".c_proj.") != std::string::npos;
    return {residual ? &residual_ : &plain_, RandomBits(seed_, tensors_++)};
  }

 private:
  NormalTable plain_, residual_;
  uint64_t seed_;
  uint64_t tensors_ = 0;
};

absl::Status WriteShard(const std::vector<WeightSpec>& specs, const std::string& path, DType dtype,
                        Contents& contents, TensorStream& stream) {
  std::vector<SafetensorsWriter::Declared> declared;
  for (const WeightSpec& spec : specs) {
    declared.push_back(
        {spec.name, dtype, {spec.shape.dims.begin(), spec.shape.dims.begin() + spec.shape.rank}});
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsWriter> writer,
                   SafetensorsWriter::Create(path, declared));
  for (const WeightSpec& spec : specs) {
    RETURN_IF_ERROR(stream.Write(contents.Of(spec), spec.shape.elements(), *writer));
  }
  return writer->Finish();
}

absl::StatusOr<ModelConfig> ConfigOf(const CheckpointRecipe& recipe) {
  constexpr int64_t kMaxLayers = 4096;
  ASSIGN_OR_RETURN(ModelConfig config, CheckpointRecipeConfig(recipe.like));
  if (recipe.layers < 0 || recipe.layers > kMaxLayers) {
    return absl::InvalidArgumentError(
        absl::StrCat("--layers ", recipe.layers, ": must be from 1 to ", kMaxLayers,
                     ", or 0 for the model's own ", config.num_layers));
  }
  if (!IsFloat(recipe.dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--dtype ", Name(recipe.dtype), ": must be f32, bf16 or f16"));
  }
  if (recipe.out_dir.empty()) return absl::InvalidArgumentError("the output directory has no name");
  if (recipe.layers > 0) config.num_layers = recipe.layers;
  config.dtype = recipe.dtype;
  return config;
}

}  // namespace

absl::Status MakeCheckpoint(const CheckpointRecipe& recipe, const CheckpointProgress& progress) {
  ASSIGN_OR_RETURN(const ModelConfig config, ConfigOf(recipe));
  const int64_t total_bytes = TotalParameters(config) * static_cast<int64_t>(SizeOf(config.dtype));
  ASSIGN_OR_RETURN(const std::unique_ptr<OutputDirectory> out,
                   OutputDirectory::Claim(recipe.out_dir));
  RETURN_IF_ERROR(CheckSpace(out->path(), total_bytes));

  const auto shards = PlanShards(AllWeightSpecs(config), config.dtype, recipe.max_shard_bytes);
  Contents contents(config.dtype, config.num_layers, recipe.seed);
  TensorStream stream(config.dtype, total_bytes, progress);
  nlohmann::json index;
  index["metadata"]["total_size"] = total_bytes;
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shards.size() == 1 ? "model.safetensors"
                                                : absl::StrFormat("model-%05d-of-%05d.safetensors",
                                                                  i + 1, shards.size());
    RETURN_IF_ERROR(WriteShard(shards[i], out->Add(name), config.dtype, contents, stream));
    for (const WeightSpec& spec : shards[i]) index["weight_map"][spec.name] = name;
  }
  if (shards.size() > 1) {
    RETURN_IF_ERROR(WriteText(out->Add("model.safetensors.index.json"), index.dump(2) + "\n"));
  }
  // Last, so that a directory with a config.json is a whole checkpoint.
  RETURN_IF_ERROR(WriteText(out->Add("config.json"), ConfigJson(config)));
  out->Keep();
  return absl::OkStatus();
}

}  // namespace trireme
