#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "kernels/quantize.h"
#include "kernels/status.h"
#include "models/float_convert.h"
#include "models/json_file.h"
#include "models/weights.h"

namespace trireme {
namespace {

constexpr int64_t kMaxIndexBytes = 100'000'000;
constexpr int64_t kConvertChunkBytes =
    1 << 20;  // stays in the second-level cache between read and conversion

bool Exists(const std::string& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0;
}

std::string BaseName(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string ShapeText(const std::vector<int64_t>& dims) {
  return absl::StrCat("[", absl::StrJoin(dims, ", "), "]");
}

bool SameShape(const Shape& shape, const std::vector<int64_t>& dims) {
  return std::equal(dims.begin(), dims.end(), shape.dims.begin(), shape.dims.begin() + shape.rank);
}

// The weight_map of an index file: tensor name to shard file name.
absl::StatusOr<std::map<std::string, std::string>> ReadWeightMap(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxIndexBytes));
  ASSIGN_OR_RETURN(const nlohmann::json index, ParseJsonObject(text, path));
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty()) {
    return absl::InvalidArgumentError(
        path + ": weight_map: must be an object that maps tensor names to file names");
  }
  std::map<std::string, std::string> out;
  for (const auto& [name, value] : map->items()) {
    const std::string file = value.is_string() ? value.get<std::string>() : "";
    // Only names of files in the checkpoint's own directory: an index must not make us read
    // elsewhere.
    if (file.empty() || file == "." || file == ".." || file.find('/') != std::string::npos ||
        file.find('\0') != std::string::npos) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": weight_map: ", Quoted(name),
                                                     " must map to the plain "
                                                     "name of a file in this directory, not ",
                                                     Quoted(file)));
    }
    out[name] = file;
  }
  return out;
}

// Why a stored tensor cannot serve as `spec`, or empty.
std::string Mismatch(const WeightSpec& spec, const SafetensorsFile& file,
                     const TensorEntry& entry) {
  if (!entry.foreign_dtype.empty() || !IsFloat(entry.dtype)) {
    return absl::StrCat("tensor ", Quoted(spec.name), " in ", BaseName(file.path()),
                        " is of dtype ",
                        entry.foreign_dtype.empty() ? Name(entry.dtype) : entry.foreign_dtype,
                        "; weights must be F32, BF16 or F16");
  }
  if (!SameShape(spec.shape, entry.dims)) {
    return absl::StrCat("tensor ", Quoted(spec.name), " in ", BaseName(file.path()), " has shape ",
                        ShapeText(entry.dims), "; config.json asks for ", spec.shape.ToString(),
                        " (", spec.fields, ")");
  }
  return "";
}

// A bias that config.json does not tell of, or a layer too many, left out, makes a model that talks
// nonsense.
bool TakesPart(const std::string& name) {
  return absl::StartsWith(name, "model.") && !absl::StrContains(name, ".rotary_emb.");
}

// A piece of a stored tensor: `count` runs of `length` neighbouring elements, `stride` apart.
struct Runs {
  int64_t first, count, length, stride;
};

// Rows [first_row, first_row + rows) of the piece.
Runs RunsOf(const WeightSpec& spec, const Range& piece, int64_t first_row, int64_t rows) {
  const int64_t row = TensorView::RowElements(spec.shape);
  if (spec.split == Split::kCols) return {first_row * row + piece.begin, rows, piece.size(), row};
  return {(piece.begin + first_row) * row, 1, rows * row, 0};
}

// Reads `count` elements at byte `offset` to `out`, converted.
absl::Status ReadRun(const SafetensorsFile& file, int64_t offset, DType stored, int64_t count,
                     DType wanted, char* out) {
  const auto size = static_cast<int64_t>(SizeOf(stored));
  if (stored == wanted) return file.Read(offset, count * size, out);
  const int64_t chunk = kConvertChunkBytes / size;
  std::vector<char> scratch(std::min(count, chunk) * size);
  for (int64_t done = 0; done < count; done += chunk) {
    const int64_t now = std::min(chunk, count - done);
    RETURN_IF_ERROR(file.Read(offset + done * size, now * size, scratch.data()));
    ConvertFloats(stored, scratch.data(), wanted, out, now);
    out += now * static_cast<int64_t>(SizeOf(wanted));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<WeightLoader>> WeightLoader::Open(const std::string& model_dir) {
  std::unique_ptr<WeightLoader> loader(new WeightLoader);
  loader->model_dir_ = model_dir;
  const std::string single = model_dir + "/model.safetensors";
  const std::string index = single + ".index.json";
  std::map<std::string, std::string> weight_map;
  std::set<std::string> shards;
  if (Exists(single)) {
    shards.insert(BaseName(single));
  } else if (Exists(index)) {
    ASSIGN_OR_RETURN(weight_map, ReadWeightMap(index));
    for (const auto& [name, file] : weight_map) shards.insert(file);
  } else {
    return absl::NotFoundError(
        absl::StrCat(model_dir,
                     ": has neither model.safetensors nor model.safetensors.index.json; weights "
                     "are read from these"));
  }
  for (const std::string& shard : shards) {
    auto file = SafetensorsFile::Open(absl::StrCat(model_dir, "/", shard));
    if (absl::IsNotFound(file.status())) {
      return absl::NotFoundError(absl::StrCat(index, ": names the shard ", Quoted(shard),
                                              ", which is not in ", model_dir));
    }
    RETURN_IF_ERROR(file.status());
    loader->files_.push_back(std::move(*file));
    const SafetensorsFile* opened = loader->files_.back().get();
    for (const auto& [name, entry] : opened->header().tensors) {
      const auto [at, added] = loader->tensors_.emplace(name, Located{opened, &entry});
      if (!added) {
        return absl::InvalidArgumentError(
            absl::StrCat(model_dir, ": tensor ", Quoted(name), " is in both ",
                         BaseName(at->second.file->path()), " and ", shard));
      }
      loader->total_bytes_ += entry.end - entry.begin;
    }
  }
  for (const auto& [name, file] : weight_map) {
    const auto at = loader->tensors_.find(name);
    if (at == loader->tensors_.end() || BaseName(at->second.file->path()) != file) {
      return absl::InvalidArgumentError(absl::StrCat(index, ": lists tensor ", Quoted(name), " in ",
                                                     file, ", which does not hold it"));
    }
  }
  return loader;
}

absl::StatusOr<WeightLoader::Located> WeightLoader::Locate(const std::string& name) const {
  const auto at = tensors_.find(name);
  if (at != tensors_.end()) return at->second;
  return absl::NotFoundError(
      absl::StrCat(model_dir_, ": tensor ", Quoted(name), " is missing; config.json asks for it"));
}

int64_t WeightLoader::PieceBytes(const WeightSpec& spec, int part, int parts) const {
  const auto located = Locate(spec.name);
  CHECK(located.ok()) << spec.name;
  const int64_t whole = located->entry->end - located->entry->begin;
  if (spec.split == Split::kNone) return whole;
  const int64_t extent = spec.shape[spec.split == Split::kCols ? 1 : 0];
  return whole / extent * PieceOfSpec(spec, part, parts).size();
}

absl::Status WeightLoader::Check(const std::vector<WeightSpec>& specs) const {
  absl::Status first;
  int64_t problems = 0;
  std::set<absl::string_view> known;
  for (const WeightSpec& spec : specs) {
    known.insert(spec.name);
    const auto located = Locate(spec.name);
    absl::Status problem = located.status();
    if (located.ok()) {
      const std::string mismatch = Mismatch(spec, *located->file, *located->entry);
      if (!mismatch.empty())
        problem = absl::InvalidArgumentError(absl::StrCat(model_dir_, ": ", mismatch));
    }
    problems += !problem.ok();
    first.Update(problem);
  }
  for (const auto& [name, located] : tensors_) {
    if (known.count(name) != 0 || !TakesPart(name)) continue;
    ++problems;
    first.Update(absl::InvalidArgumentError(
        absl::StrCat(model_dir_, ": tensor ", Quoted(name), " in ", BaseName(located.file->path()),
                     " is none that config.json asks for: correct config.json (num_hidden_layers, "
                     "attention_bias, mlp_bias, use_bias, architectures), or take the tensor "
                     "out")));
  }
  if (problems <= 1) return first;
  return absl::Status(first.code(), absl::StrCat(first.message(), " (and ", problems - 1,
                                                 " more tensors are wrong)"));
}

absl::Status WeightLoader::Load(const WeightSpec& spec, int part, int parts, TensorView dst) {
  const int64_t rows =
      spec.split == Split::kCols ? spec.shape[0] : PieceOfSpec(spec, part, parts).size();
  CHECK_EQ(dst.dim(0), rows) << spec.name;
  return LoadRows(spec, part, parts, 0, dst);
}

absl::Status WeightLoader::LoadRows(const WeightSpec& spec, int part, int parts, int64_t first_row,
                                    TensorView dst) {
  const Range piece = PieceOfSpec(spec, part, parts);
  Shape shape = spec.shape;
  if (spec.split == Split::kCols) shape.dims[1] = piece.size();
  const int64_t rows = spec.split == Split::kCols ? spec.shape[0] : piece.size();
  shape.dims[0] = dst.dim(0);
  CHECK(dst.shape == shape) << spec.name << ": rows " << shape.ToString() << ", destination "
                            << dst.shape.ToString();
  CHECK(first_row >= 0 && first_row + dst.dim(0) <= rows) << spec.name;
  CHECK(dst.contiguous() && IsFloat(dst.dtype)) << spec.name;
  ASSIGN_OR_RETURN(const Located located, Locate(spec.name));
  const TensorEntry& entry = *located.entry;
  if (const std::string mismatch = Mismatch(spec, *located.file, entry); !mismatch.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(model_dir_, ": ", mismatch));
  }
  if (shape.elements() == 0) return absl::OkStatus();
  const Runs runs = RunsOf(spec, piece, first_row, dst.dim(0));
  const auto size = static_cast<int64_t>(SizeOf(entry.dtype));
  char* out = dst.as<char>();
  for (int64_t i = 0; i < runs.count; ++i) {
    const int64_t offset = entry.begin + (runs.first + i * runs.stride) * size;
    RETURN_IF_ERROR(ReadRun(*located.file, offset, entry.dtype, runs.length, dst.dtype, out));
    out += runs.length * static_cast<int64_t>(SizeOf(dst.dtype));
    bytes_read_ += runs.length * size;
  }
  return absl::OkStatus();
}

absl::Status WeightLoader::RowMaxima(const WeightSpec& spec, int part, int parts, float* maxima) {
  const int64_t piece = PieceOfSpec(spec, part, parts).size();
  const bool columns = spec.split == Split::kCols;
  const int64_t rows = columns ? spec.shape[0] : piece, width = columns ? piece : spec.shape[1];
  const int64_t step = std::clamp<int64_t>(kConvertChunkBytes / (4 * width), 1, rows);
  std::vector<float> values(step * width);
  for (int64_t first = 0; first < rows; first += step) {
    const TensorView some(values.data(), DType::kF32, {std::min(step, rows - first), width});
    RETURN_IF_ERROR(LoadRows(spec, part, parts, first, some));
    RETURN_IF_ERROR(CheckFinite(spec, first, some));
    for (int64_t r = 0; r < some.dim(0); ++r)
      maxima[first + r] = RowMaximum(some.row<float>(r), width);
  }
  return absl::OkStatus();
}

absl::Status WeightLoader::CheckFinite(const WeightSpec& spec, int64_t first_row,
                                       ConstTensorView rows) const {
  for (int64_t r = 0; r < rows.dim(0); ++r) {
    if (std::isfinite(RowMaximum(rows.row<float>(r), rows.dim(1)))) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        model_dir_, ": tensor ", Quoted(spec.name), " holds NaN or infinity in row ", first_row + r,
        " of this rank's piece; --quantization fp8 takes finite weights only"));
  }
  return absl::OkStatus();
}

}  // namespace trireme
