#include "tests/random_checkpoint.h"

#include <cmath>
#include <fstream>
#include <vector>

#include "kernels/check.h"
#include "models/checkpoint_maker.h"
#include "models/float_convert.h"
#include "models/safetensors.h"
#include "models/weights.h"
#include "tests/testing.h"

namespace trireme {

void WriteRandomCheckpoint(const std::string& dir, const ModelConfig& config) {
  std::ofstream(dir + "/config.json") << ConfigJson(config);
  const std::vector<WeightSpec> specs = AllWeightSpecs(config);
  std::vector<SafetensorsWriter::Declared> declared;
  for (const WeightSpec& spec : specs) {
    const auto* dims = spec.shape.dims.data();
    declared.push_back({spec.name, config.dtype, {dims, dims + spec.shape.rank}});
  }
  auto writer = SafetensorsWriter::Create(dir + "/model.safetensors", declared);
  CHECK(writer.ok()) << writer.status().ToString();
  for (size_t i = 0; i < specs.size(); ++i) {
    const Shape& shape = specs[i].shape;
    const bool norm = shape.rank == 1;
    const double scale = norm ? 0.1 : std::sqrt(3.0 / static_cast<double>(shape[1]));
    std::vector<float> values(shape.elements());
    for (size_t k = 0; k < values.size(); ++k)
      values[k] = static_cast<float>((norm ? 1.0 : 0.0) + scale * RandomValue(i + 1, k));
    std::vector<char> bytes(values.size() * SizeOf(config.dtype));
    ConvertFloats(DType::kF32, values.data(), config.dtype, bytes.data(), shape.elements());
    CHECK((*writer)->Append(bytes.data(), static_cast<int64_t>(bytes.size())).ok());
  }
  CHECK((*writer)->Finish().ok());
}

}  // namespace trireme
