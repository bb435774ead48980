#include "tests/rewritten_checkpoint.h"

#include <filesystem>

#include "kernels/check.h"
#include "kernels/quantize.h"
#include "models/safetensors.h"

namespace trireme {

void RewriteCheckpoint(const std::string& from, const std::string& to,
                       const std::function<void(const WeightSpec&, std::vector<float>*)>& edit) {
  std::filesystem::copy_file(from + "/config.json", to + "/config.json");
  const ModelConfig config = LoadModelConfig(from).value();
  const std::unique_ptr<WeightLoader> loader = WeightLoader::Open(from).value();
  const std::vector<WeightSpec> specs = AllWeightSpecs(config);
  std::vector<SafetensorsWriter::Declared> declared;
  for (const WeightSpec& spec : specs) {
    const auto* dims = spec.shape.dims.data();
    declared.push_back({spec.name, DType::kF32, {dims, dims + spec.shape.rank}});
  }
  const auto writer = SafetensorsWriter::Create(to + "/model.safetensors", declared).value();
  for (const WeightSpec& spec : specs) {
    std::vector<float> values(spec.shape.elements());
    CHECK(loader->Load(spec, 0, 1, TensorView(values.data(), DType::kF32, spec.shape)).ok());
    edit(spec, &values);
    CHECK(writer->Append(values.data(), static_cast<int64_t>(values.size() * sizeof(float))).ok());
  }
  CHECK(writer->Finish().ok());
}

void WriteDequantizedCheckpoint(const std::string& from, const std::string& to) {
  RewriteCheckpoint(from, to, [](const WeightSpec& spec, std::vector<float>* values) {
    const bool linear = spec.shape.rank == 2 && spec.name.starts_with("model.layers.");
    if (!linear) return;
    const int64_t columns = spec.shape[1];
    std::vector<E4M3> codes(columns);
    for (int64_t r = 0; r < spec.shape[0]; ++r) {
      float* row = values->data() + r * columns;
      const float scale = ScaleOfRow(RowMaximum(row, columns));
      QuantizeRow(row, columns, scale, codes.data());
      for (int64_t c = 0; c < columns; ++c) row[c] = scale * ToFloat(codes[c]);
    }
  });
}

}  // namespace trireme
