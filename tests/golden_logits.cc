#include "tests/golden_logits.h"

#include <gtest/gtest.h>

#include "models/safetensors.h"

namespace trireme {

std::vector<GoldenLogits> ReadGoldenLogits(const std::string& dir) {
  const auto file = SafetensorsFile::Open(dir + "/golden/logits.safetensors").value();
  std::vector<GoldenLogits> out;
  for (const auto& [name, entry] : file->header().tensors) {
    const size_t dot = name.find(".logits");
    if (dot == std::string::npos) continue;
    GoldenLogits golden{name.substr(0, dot), {}, {}};
    golden.logits.resize((entry.end - entry.begin) / sizeof(float));
    EXPECT_TRUE(file->Read(entry.begin, entry.end - entry.begin, golden.logits.data()).ok());
    const TensorEntry& ids = file->header().tensors.at(golden.name + ".input_ids");
    std::vector<int64_t> wide((ids.end - ids.begin) / sizeof(int64_t));
    EXPECT_TRUE(file->Read(ids.begin, ids.end - ids.begin, wide.data()).ok());
    golden.ids.assign(wide.begin(), wide.end());
    out.push_back(std::move(golden));
  }
  return out;
}

}  // namespace trireme
